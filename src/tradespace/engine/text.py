"""A request's output as text while it grows: tokens in, text out as soon as it is certain, stop strings found across token boundaries and left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Turns tokens into text one at a time; `push` returns only whole characters, `flush` what is left at the end."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextCodec(Protocol):
    """What the engine needs of a tokenizer; `loading.tokenizer.Tokenizer` has it."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def stream_decoder(self) -> TextDecoder: ...


class StopStrings:
    """Lets text through except for what may still become a stop string; after one has been found, nothing more."""

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain now. `found` is set when the earliest stop string is complete; what follows it is dropped."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(at, -len(stop), stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            certain, self._held = self._held[:at], ""
            return certain
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def flush(self) -> str:
        """What was held back: the output has ended before it became a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest beginning of `stop` that the held text ends with."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0


class OutputText:
    """One request's tokens → text, without its stop tokens and stop strings."""

    def __init__(self, decoder: TextDecoder, *, stops: Sequence[str], stop_ids: Iterable[int], min_tokens: int = 0):
        self._decoder = decoder
        self._stops = StopStrings(stops)
        self._stop_ids = frozenset(stop_ids)
        self._quiet = min_tokens  # so many first tokens pass without a look for stop strings
        self._count = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.found is not None

    def push(self, token_id: int) -> str:
        self._count += 1
        if token_id in self._stop_ids:
            return ""
        text = self._decoder.push(token_id)
        return text if self._count <= self._quiet else self._stops.push(text)

    def finish(self) -> str:
        """The rest of the text, once no token will follow."""
        return "" if self.stopped else self._stops.push(self._decoder.flush()) + self._stops.flush()
