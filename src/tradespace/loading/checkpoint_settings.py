"""A checkpoint's quantization_config read to the letter: every field is understood, known to change nothing, or an UnsupportedError that names it.

A field whose value is null counts as absent. What a convention does not read is refused at `finish`, so a field that somebody invents later is never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tradespace.errors import UnsupportedError
from tradespace.loading.rawfile import shown
from tradespace.spec.published import plain_expression

MAX_NAMES = 2**17  # modules that a list may name
MAX_PATTERN_CHARS = 512


class Settings:
    """Reads of one dictionary; `path` is where it sits in the config."""

    def __init__(self, values: object, *, path: str = "quantization_config"):
        self.path = path
        if not isinstance(values, Mapping):
            raise UnsupportedError(f"{path} must be a dictionary; it is {shown(values)}")
        self.values: Mapping[Any, Any] = values
        self.read: set[str] = set()

    def refused(self, key: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path}.{key} = {shown(self.values.get(key))}: {why}. Refused, because it could change results")

    def raw(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def one_of(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value, which must be one of `allowed` (of the same type: 1 is not True); `default` where it is absent, None: it must be there."""
        value = self.raw(key, default)
        if not any(type(value) is type(want) and value == want for want in allowed):
            raise self.refused(key, f"read here: {', '.join(map(str, allowed))}")
        return value

    def whole(self, key: str, *, default: int | None = None, low: int, high: int) -> int:
        value = self.raw(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.refused(key, f"a whole number from {low} to {high} is needed")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of module names or patterns; absent: none."""
        value = self.raw(key, [])
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > MAX_NAMES or not all(isinstance(name, str) for name in value):
            raise self.refused(key, "a list of module names is needed")
        if any(len(name) > MAX_PATTERN_CHARS for name in value):
            raise self.refused(key, f"a name has at most {MAX_PATTERN_CHARS} characters")
        return tuple(value)

    def section(self, key: str) -> Settings:
        return Settings(self.raw(key), path=f"{self.path}.{key}")

    def inert(self, *keys: str) -> None:
        """Fields that say how the codes were chosen, or who wrote them, and not what they mean."""
        self.read.update(keys)

    def finish(self) -> None:
        for key, value in self.values.items():
            if value is not None and key not in self.read:
                name = key if isinstance(key, str) else repr(key)
                why = "not a field that is understood here. Refused, because it could change results"
                raise UnsupportedError(f"{self.path}.{name[:80]} = {shown(value)}: {why}")


def name_matcher(settings: Settings, key: str, patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a module's name is one of `patterns`: a whole name, or "re:" and a regular expression that matches from its beginning.

    Raises UnsupportedError for a pattern with nested repetition, whose search could take for ever.
    """
    exact = {pattern for pattern in patterns if not pattern.startswith("re:")}
    compiled = []
    for pattern in patterns:
        if pattern.startswith("re:"):
            expression = plain_expression(pattern[3:])
            if expression is None:
                raise settings.refused(key, f"the pattern {shown(pattern)} is no regular expression, or more than names, .*, \\d+, [sets] and (alter|natives)")
            compiled.append(expression)
    return lambda name: name in exact or any(expression.match(name) for expression in compiled)


def grouped_format(settings: Settings, key: str, bits: int, group: int, *, zero_points: bool) -> tuple[str, int]:
    """(our format, how often each stored scale stands in it): a group of 256 is two of 128 with one scale. `group` -1: the whole row.

    >>> grouped_format(Settings({"group_size": 256}), "group_size", 4, 256, zero_points=True)
    ('int4-g128-zp', 2)
    """
    ending = "-zp" if zero_points else ""
    if group == -1:
        return f"int{bits}-g128{ending}", -1
    for ours in (128, 64, 32):
        if group > 0 and group % ours == 0:
            return f"int{bits}-g{ours}{ending}", group // ours
    raise settings.refused(key, f"int{bits} is held in groups of 32, 64, 128 or their multiples")


def skip_matcher(settings: Settings, key: str) -> Callable[[str], bool]:
    """Whether a module is left alone by a list such as `modules_to_not_convert`: a name in it is the module, one that holds it, or its ending."""
    names = settings.names(key)
    for name in names:
        if not re.fullmatch(r"[\w.\-]+", name):
            raise settings.refused(key, f"{shown(name)} is not a module's name")
    return lambda module: any(module.endswith(name) or f"{module}.".startswith(f"{name}.") or f".{name}." in f".{module}." for name in names)
