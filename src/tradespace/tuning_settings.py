"""What a training is told, and what it tells: settings, progress, and the run as it was."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from tradespace.errors import InputError
from tradespace.train.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run shows while it runs. mfu: share of the machine's measured product rate, recomputation not counted."""

    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_s: float
    mfu: float | None
    memory_bytes: int
    budget_bytes: int
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run was and what came of it. losses: of every step."""

    model: str
    output: str
    result: str
    plan: dict[str, Any]
    ledger: dict[str, Any]
    steps: int
    ended: str
    losses: list[float] = field(repr=False)
    tokens_per_s: float
    mfu: float | None
    predicted_bytes: int
    peak_bytes: int
    budget_bytes: int
    seconds: float
    resumed_from: int | None = None
    rank: int = 0
    ranks: list[dict[str, int]] = field(default_factory=list)  # predicted_bytes and peak_bytes of each, where there are several

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to learn, for all three commands. batch: sequences of a step; epochs counts where steps is None.

    device: cpu, cuda or cuda:N; None: the first CUDA device that can be used, else the CPU. Of several ranks on CUDA each takes its own.
    data_parallel, tensor_parallel: ranks, which torchrun must have started; None: data ranks as many as were started, one tensor rank. memory is each one's.
    """

    context: int = 512
    batch: int = 8
    steps: int | None = None
    epochs: float = 1.0
    lr: float | None = None
    schedule: str = "cosine"
    warmup: int = 0
    decay: float = 0.0
    clip: float = 0.0
    optimizer: str | None = None
    weights: str | None = None
    checkpointing: str | None = None
    fused: bool | None = None
    seed: int = 0
    shuffle: bool = True
    save_every: int = 100
    time_limit_s: float | None = None
    memory: str | int | None = None
    resume: bool = False
    offline: bool = False
    data_parallel: int | None = None
    tensor_parallel: int | None = None
    device: str | None = None

    def __post_init__(self):
        for name, least in (("context", 2), ("batch", 1), ("steps", 1), ("save_every", 1), ("warmup", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: at least {least} is needed")
        if not 0 < self.epochs < math.inf:
            raise InputError(f"--epochs {self.epochs}: a number above 0 is needed, such as 1 or 0.5; or give --steps")
        if self.fused and self.clip:
            raise InputError("--clip needs all gradients at once, and a fused step forgets them. Leave --clip away, or give --no-fused")
        Schedule(lr=1e-3 if self.lr is None else self.lr, steps=1, shape=self.schedule)  # refuses what is no rate and no schedule


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What a run takes beside its plan: bytes, bytes of each token of a micro-batch, bytes of a logit; whether its command has one method alone.

    See `planner.training.Question`."""

    spare_bytes: int = 0
    spare_token_bytes: int = 0
    logit_bytes: int | None = None
    only_method: bool = True
