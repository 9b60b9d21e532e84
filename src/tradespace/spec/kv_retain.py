"""What of the past stays resident. All that an implementation needs to know is here in closed form: which slot, how many, exact or not.

full      every token.
sliding   the last `window` tokens and the first `sinks` (StreamingLLM, arXiv:2309.17453). A key keeps the rotary position that it was written with: inside the
          trained context, beyond which no engine of ours goes, every distance is one that the model was trained on. (The paper counts positions within the
          cache, which shortens the sinks' distances and makes endless streams possible.)
h2o       `budget` tokens of each layer and key-value head: the last `recent` of them, and those with the largest sum of attention weights so far
(arXiv:2306.14048). snapkv    `budget` tokens of each layer and key-value head: the last `window`, and those that they attend to most, smoothed over 5
neighbours
          (arXiv:2404.14469). Chosen at the end of every chunk of a prompt, which for a prompt in one chunk is the paper's rule; while decoding the weakest of
          the prompt's tokens makes room for each new one.
recent    the last `recent` tokens' keys and values; older ones are rebuilt at every step from their token ids, layer by layer. Exact. 0: only ids stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from tradespace.errors import InputError
from tradespace.spec.mixers import Attention
from tradespace.units import format_bytes, parse_bytes

SNAP_WINDOW = 32
SNAP_NEIGHBOURS = 5
HEAD_STATE_BYTES = 8  # of a slot and head that an evicting policy keeps: its position (int32) and its score (fp32)


@dataclass(frozen=True, kw_only=True)
class Retain:
    """See the module. `budget_bytes` is a sequence's budget that has not been turned into tokens yet (`spec.kv.resolve_budget` does that)."""

    kind: str = "full"
    window: int = 0
    sinks: int = 0
    budget: int = 0
    budget_bytes: int = 0
    recent: int = 0

    RUNS_SINCE: ClassVar[dict[str, str | None]] = {"full": "0.1", "sliding": "0.3", "h2o": "0.3", "snapkv": "0.3", "recent": "0.3"}

    def __post_init__(self):
        if self.kind not in self.RUNS_SINCE:
            raise InputError(f"unknown KV retention '{self.kind}'. Known: {', '.join(self.RUNS_SINCE)}")
        for name in ("window", "sinks", "budget", "budget_bytes", "recent"):
            if getattr(self, name) < 0:
                raise InputError(f"{self.kind} retention: {name} is {getattr(self, name)}; it cannot be negative")
        used = {
            "sliding": ("window", "sinks"),
            "h2o": ("budget", "budget_bytes", "recent"),
            "snapkv": ("budget", "budget_bytes", "window"),
            "recent": ("recent",),
        }
        for name in {"window", "sinks", "budget", "budget_bytes", "recent"} - set(used.get(self.kind, ())) - ({"sinks"} if self.kind == "full" else set()):
            if getattr(self, name):
                raise InputError(f"{self.kind} retention has no {name}; leave it away")
        if self.kind == "sliding" and self.window < 1:
            raise InputError(f"sliding retention needs a window of at least 1 token; got {self.window}")
        if self.kind in ("full", "sliding") and not 0 <= self.sinks <= max(self.window, 0):
            raise InputError(f"sinks ({self.sinks}) must lie between 0 and the window ({self.window})")
        if self.evicts:
            held = "recent tokens" if self.kind == "h2o" else "window"
            if self.budget == 0 and self.budget_bytes == 0:
                raise InputError(f"{self.kind} retention needs a budget of at least 1 token")
            if self.budget and self.protected >= self.budget:
                raise InputError(f"{self.kind} retention: a budget of {self.budget} tokens leaves nothing to choose beside {self.protected} {held}")

    @property
    def runs_since(self) -> str | None:
        return self.RUNS_SINCE[self.kind]

    @property
    def evicts(self) -> bool:
        """Whether it chooses by attention, for each head by itself; kernels must then return weights."""
        return self.kind in ("h2o", "snapkv")

    @property
    def rebuilds(self) -> bool:
        return self.kind == "recent"

    @property
    def protected(self) -> int:
        """The last tokens that an evicting policy never drops: half of H2O's budget unless told otherwise, as in the paper; SnapKV's window."""
        if self.kind == "h2o":
            return self.recent or self.budget // 2
        return (self.window or SNAP_WINDOW) if self.kind == "snapkv" else 0

    @property
    def capacity(self) -> int | None:
        """Most tokens that one sequence keeps; None: all of them."""
        if self.kind == "full":  # a search asks a hundred thousand times
            return None
        kept = {"sliding": self.window + self.sinks, "h2o": self.budget, "snapkv": self.budget, "recent": self.recent}
        return kept.get(self.kind)

    def tokens(self, length: int, mixer: Attention | None = None) -> int:
        """Tokens that one layer keeps of a sequence of `length`: the slots that it needs."""
        return length if self.capacity is None else min(length, self.capacity)

    def exact_for(self, window: int | None) -> bool:
        """Full keeps everything and recent rebuilds it; sliding is exact only where the pattern itself looks no further back."""
        return self.kind in ("full", "recent") or (self.kind == "sliding" and window is not None and window <= self.window)

    def describe(self) -> str:
        if self.kind == "sliding":
            return f"sliding({self.window}, {self.sinks})"
        if self.evicts:
            return f"{self.kind}({format_bytes(self.budget_bytes) if self.budget_bytes else self.budget}, {self.protected})"
        return f"recent({self.recent})" if self.rebuilds else "full"


FULL = Retain()


def _tokens(text: str, context: int, what: str) -> int:
    if text == "sqrt":  # rounded up: the square of what stays is no less than the context
        return isqrt(max(0, context - 1)) + 1
    if not text.isdigit():
        raise InputError(f"KV retention {what}: '{text}' is no number of tokens (a whole number, or sqrt for √context)")
    return int(text)


def parse_retain(text: str, context: int) -> Retain:
    """What a command line says: full, sliding:WINDOW[,SINKS], h2o:BUDGET[,RECENT], snapkv:BUDGET[,WINDOW], recent:TOKENS; a budget in tokens or bytes.

    >>> parse_retain("sliding:1020,4", 2048).describe(), parse_retain("recent:sqrt", 2048).recent, parse_retain("h2o:4MiB", 2048).budget_bytes
    ('sliding(1020, 4)', 46, 4194304)
    """
    kind, _, rest = text.partition(":")
    values = rest.split(",") if rest else []
    most = {"full": 0, "sliding": 2, "h2o": 2, "snapkv": 2, "recent": 1}.get(kind)
    if most is None:
        raise InputError(f"unknown KV retention '{kind}'. Known: {', '.join(Retain.RUNS_SINCE)}")
    if len(values) > most or (most and not values):
        forms = {"full": "full", "sliding": "sliding:WINDOW[,SINKS]", "h2o": "h2o:BUDGET[,RECENT]", "snapkv": "snapkv:BUDGET[,WINDOW]"}
        raise InputError(f"KV retention '{text}': write {forms.get(kind, 'recent:TOKENS')}")
    if kind == "full":
        return Retain()
    if kind == "recent":
        return Retain(kind=kind, recent=_tokens(values[0], context, kind))
    second = _tokens(values[1], context, kind) if len(values) == 2 else 0
    if kind == "sliding":
        return Retain(kind=kind, window=_tokens(values[0], context, kind), sinks=second)
    budget = {"budget": _tokens(values[0], context, kind)} if values[0].isdigit() or values[0] == "sqrt" else {"budget_bytes": parse_bytes(values[0])}
    return Retain(kind=kind, **budget, **({"recent": second} if kind == "h2o" else {"window": second}))
