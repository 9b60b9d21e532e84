"""Bytes, seconds and rates as people write and read them. GiB is 2**30, GB is 10**9, and a bare G means GiB."""

import re

from tradespace.errors import InputError

KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

# A bare letter is binary, as `free -g`, `docker -m` and llama.cpp read it; "GB" is decimal, as on a disk's or a card's box.
_SUFFIXES = {
    "": 1, "b": 1,
    "k": KiB, "m": MiB, "g": GiB, "t": TiB,
    "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB,
    "kb": KB, "mb": MB, "gb": GB, "tb": TB,
}  # fmt: skip
_SIZE = re.compile(r"^\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*|%)\s*$")


def parse_bytes(text: str | int, *, free_bytes: int | None = None) -> int:
    """Bytes for `700MiB`, `6GiB`, `6G` (= GiB), `6GB` (decimal), `123456` or, given `free_bytes`, `80%` of it.

    >>> parse_bytes("6G"), parse_bytes("6GB"), parse_bytes("1.5 KiB"), parse_bytes("80%", free_bytes=1000)
    (6442450944, 6000000000, 1536, 800)
    """
    if isinstance(text, int):
        number, suffix = float(text), ""
    else:
        match = _SIZE.match(text)
        if not match:
            raise InputError(f"'{text}' is not a size. Write for example 700MiB, 6GiB, 6G (= GiB), 6GB (decimal) or 80%")
        number, suffix = float(match.group(1)), match.group(2).lower()
    if suffix == "%":
        if free_bytes is None:
            raise InputError(f"'{text}': a percentage needs a machine to be a share of; here write a size such as 6GiB")
        if not 0 < number <= 100:
            raise InputError(f"'{text}': a share of the free memory lies above 0% and at most at 100%")
        return int(free_bytes * number / 100)
    if suffix not in _SUFFIXES:
        raise InputError(f"'{text}': unknown unit '{suffix}'. Known: B, KiB, MiB, GiB, TiB, K, M, G, T (binary), KB, MB, GB, TB (decimal), %")
    size_bytes = int(number * _SUFFIXES[suffix])
    if size_bytes <= 0:
        raise InputError(f"'{text}': a size must be at least one byte")
    return size_bytes


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        # the rounded figure decides, so that 1023.96 KiB prints as 1.0 MiB and not as 1024.0 KiB
        if abs(float(f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}")) < base:
            return _digits(value, unit)
        value /= base
    return _digits(value, units[-1])


def _digits(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.2f} {unit}" if abs(value) < 10 else f"{value:.1f} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"


def format_bytes(size_bytes: float, *, decimal: bool = False) -> str:
    """Three significant digits and a unit, binary unless `decimal`.

    >>> format_bytes(734003200), format_bytes(26953662464, decimal=True), format_bytes(0)
    ('700 MiB', '27.0 GB', '0 B')
    """
    if decimal:
        return _scaled(size_bytes, 1000, ("B", "KB", "MB", "GB", "TB", "PB"))
    return _scaled(size_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_seconds(duration_s: float) -> str:
    """A duration with a unit that keeps it readable.

    >>> format_seconds(0.00042), format_seconds(0.042), format_seconds(4.2), format_seconds(4200)
    ('420 µs', '42.0 ms', '4.20 s', '1h 10m')
    """
    if duration_s < 1e-3:
        return f"{duration_s * 1e6:.0f} µs"
    if duration_s < 1:
        return f"{duration_s * 1e3:.1f} ms"
    if duration_s < 60:
        return f"{duration_s:.2f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"


def format_rate(per_second: float, unit: str) -> str:
    """A rate such as `format_rate(61e9, 'B/s')` = '61.0 GB/s' (decimal, as data sheets have it)."""
    return _scaled(per_second, 1000, (unit, f"K{unit}", f"M{unit}", f"G{unit}", f"T{unit}", f"P{unit}"))
