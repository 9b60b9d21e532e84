"""What one cell of a benchmark times. Imported by every engine's process, so it needs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["decode", "prefill", "batch"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """decode: `tokens` after a prompt of `prompt` tokens. batch: the same for `sequences` at once. prefill: the prompt alone (`tokens` is 0).

    path          the GGUF file or folder that the engines open
    memory, weights, plan   for our engine alone
    device        "cpu", or "cuda:N" for all of them
    """

    kind: Kind
    path: str
    prompt: int
    tokens: int
    sequences: int = 1
    threads: int = 1
    memory: str | None = None
    weights: str | None = None
    plan: str | None = None
    device: str = "cpu"

    @property
    def num_timed(self) -> int:
        """Tokens that a round times."""
        return self.sequences * (self.prompt if self.kind == "prefill" else self.tokens)

    @property
    def label(self) -> str:
        return {
            "decode": f"decode at {self.prompt}",
            "prefill": f"prefill {self.prompt}",
            "batch": f"{self.sequences} sequences at {self.prompt}",
        }[self.kind]
