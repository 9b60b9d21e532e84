"""What the user needs from a plan: lengths, how many at once, and what to be fast at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tradespace.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`concurrency` sequences at once, each of `prompt_tokens` read and `output_tokens` written, none longer than `context_tokens`."""

    context_tokens: int = 2048
    concurrency: int = 1
    prompt_tokens: int = 512
    output_tokens: int = 128
    goal: Literal["latency", "throughput"] = "latency"

    def __post_init__(self):
        for name in ("context_tokens", "concurrency", "prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.prompt_tokens + self.output_tokens > self.context_tokens:
            raise InputError(
                f"prompt {self.prompt_tokens} + output {self.output_tokens} tokens exceed the context of {self.context_tokens}. "
                f"Give --context {self.prompt_tokens + self.output_tokens} or shorten one of them"
            )

    @property
    def mean_length(self) -> float:
        """Average tokens held per sequence while it is decoded."""
        return self.prompt_tokens + self.output_tokens / 2
