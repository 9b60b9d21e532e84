"""The training loop: micro-batches → loss → gradients → optimizer, step by step, with everything that a run reports and everything that ends it.

Gradients are held in buffers that are there from the start; with a fused step there are none: a parameter is updated in the backward pass as soon as its
gradient is complete. The same numbers (data order, rounding, states) come out of a run that was cut and resumed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tradespace.errors import EngineError, InputError
from tradespace.model.transformer import Transformer
from tradespace.train import checkpoints
from tradespace.train.data import MicroBatch, Order, Packed, batches
from tradespace.train.loss import chunked_loss, cross_entropy
from tradespace.train.optimizer import Optimizer
from tradespace.train.ranks import ALONE, Ranks
from tradespace.train.schedule import Schedule
from tradespace.train.shards import Shards

WINDOW = 20  # steps over which a loss is averaged before it is called diverging


class Objective(Protocol):
    """(model, micro-batch, what one target weighs) → loss, a scalar."""

    def __call__(self, model: Transformer, micro: MicroBatch, scale: float) -> Tensor: ...


def next_token(loss_tokens: int) -> Objective:
    """Plain cross entropy."""

    def loss(model: Transformer, micro: MicroBatch, scale: float) -> Tensor:
        hidden_TD = model(micro.tokens_T, micro.positions_T, micro.batch)
        return chunked_loss(model, hidden_TD, cross_entropy(micro.targets_T), scale=scale, chunk=loss_tokens)

    return loss


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a run ends and what it leaves on the way. clip: most the gradients' norm may be, 0: anything."""

    steps: int
    time_s: float | None = None
    save_every: int = 100
    clip: float = 0.0


@dataclass
class StepReport:
    """One line of the log."""

    step: int
    loss: float
    lr: float
    tokens: int
    seconds: float
    grad_norm: float | None = None


@dataclass
class Trainer:
    """A model, what of it learns, and what learns it. `step` counts finished steps."""

    model: Transformer
    parameters: Mapping[str, Tensor]
    optimizer: Optimizer
    data: Packed
    order: Order
    schedule: Schedule
    objective: Objective
    limits: Limits
    fused: bool = False
    device: torch.device | str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    shards: Shards | None = None  # where several ranks train: `parameters` are then what `shards.local` gave
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self):
        if self.fused and self.limits.clip:
            raise InputError("clipping needs all gradients at once, and a fused step forgets them. Leave --clip away, or give --no-fused")
        self._hooks = []
        if self.fused:
            for key, parameter in self.parameters.items():
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._update_at_once(key)))
        elif self.shards is None:
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)

    @property
    def ranks(self) -> Ranks:
        return ALONE if self.shards is None else self.shards.ranks

    def release(self) -> None:
        """Gives the parameters back: no hooks, no gradients. Another trainer can take them."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters.values():
            parameter.grad = None

    @property
    def gradient_bytes(self) -> int:
        return 0 if self.fused else sum(parameter.nbytes for parameter in self.parameters.values())

    def _update_at_once(self, key: str) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None, "called when a gradient is there"
            self.optimizer.step(key, parameter, parameter.grad, lr=self.schedule.at(self.step), number=self.step + 1)
            parameter.grad = None

        return update

    def advance(self) -> StepReport:
        """One step. Raises EngineError, naming the batch, where loss or gradients are no numbers or the loss runs away: on every rank alike."""
        began, lr = time.perf_counter(), self.schedule.at(self.step)
        micros = list(batches(self.data, self.order, self.step, self.device))
        ranks = self.ranks
        targets = self.data.num_targets(self.order.all_blocks(self.step))
        total, norm = 0.0, None
        for number, micro in enumerate(micros):
            # data ranks' gradients are averaged by FSDP, so each counts `data` times
            loss = self.objective(self.model, micro, ranks.data / max(1, targets))
            # a fused step changes parameters on the way: it must know first. Otherwise a device is not waited for
            value = self._agreed(loss) if self.fused else None
            if value is None or math.isfinite(value):
                loss.backward()
            value = self._agreed(loss) if value is None else value
            if not math.isfinite(value):
                raise EngineError(self._where(f"the loss is {value}", micro, number))
            total += value
        if not self.fused:
            norm = self._clip()
            if not math.isfinite(norm):
                raise EngineError(self._where("the gradients' norm is no number", micros[-1], len(micros) - 1))
            self.optimizer.step_all(self.parameters, lr=lr, number=self.step + 1)
            torch._foreach_zero_(self._slopes())  # pyright: ignore[reportPrivateImportUsage]
        self.losses.append(total)
        self.step += 1
        self._check_course(micros[0])
        return StepReport(self.step, total, lr, ranks.data * sum(len(micro.tokens_T) for micro in micros), time.perf_counter() - began, norm)

    def _agreed(self, loss: Tensor) -> float:
        """The loss over all ranks."""
        return self.ranks.sum(float(loss.detach()), "data") / self.ranks.data

    def _slopes(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def _clip(self) -> float:
        if self.shards is not None:
            self.shards.collect(self.parameters)
            norm = self.shards.norm(self.parameters)
        else:
            norms = torch._foreach_norm(self._slopes(), dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
            norm = float(torch.stack(norms).norm())
        if self.limits.clip and norm > self.limits.clip and math.isfinite(norm):
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad.mul_(self.limits.clip / (norm + 1e-6))
        return norm

    def _where(self, what: str, micro: MicroBatch, number: int) -> str:
        first, blocks = self.data.starts[micro.blocks[0]], ", ".join(map(str, micro.blocks[:8]))
        return (
            f"{what} at step {self.step + 1}, micro-batch {number + 1}: blocks {blocks} of {self.data.source} (tokens {first:,} on). The model is as the last "
            "checkpoint has it; --resume with a smaller --lr, or look at this part of the data"
        )

    def _check_course(self, micro: MicroBatch) -> None:
        if len(self.losses) < 2 * WINDOW:
            return
        means = [sum(self.losses[start : start + WINDOW]) / WINDOW for start in (0, len(self.losses) - WINDOW)]
        if means[1] > 1.5 * means[0] + 1.0:
            raise EngineError(self._where(f"the loss diverges: {means[1]:.2f} over the last {WINDOW} steps, {means[0]:.2f} over the first", micro, 0))

    # ------------------------------------------------------------------------------------------------ whole runs

    def save(self, run: Path) -> Path:
        """A checkpoint of now, of all ranks."""
        state = {"settings": dict(self.settings), "losses": self.losses}
        self.optimizer.settle()
        return checkpoints.save(run, self.step, state, self.parameters, self.optimizer.states, self.ranks)

    @torch.no_grad()
    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Goes on from a checkpoint. Raises InputError where its settings are others than this run's."""
        theirs, ours = checkpoint.state["settings"], json.loads(json.dumps(dict(self.settings)))
        differs = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if differs:
            shown = "; ".join(f"{key}: {theirs.get(key)} then, {ours.get(key)} now" for key in sorted(differs)[:3])
            raise InputError(f"--resume {checkpoint.folder}: the run was another one ({shown}). Give the same settings, or another --output")
        trained, states = checkpoint.tensors(self.ranks)
        self.optimizer.settle()
        for key, parameter in self.parameters.items():
            parameter.data.copy_(trained[key])
            for name, tensor in self.optimizer.states[key].items():
                tensor.copy_(states[f"{key}|{name}"])
        self.step, self.losses = checkpoint.step, list(checkpoint.state["losses"])

    def run(self, run: Path, *, on_step: Callable[[StepReport], None] = lambda report: None, say: Callable[[str], None] = lambda line: None) -> str:
        """Steps until the limits or an interrupt; a checkpoint every so often and at the end. Returns why it ended."""
        began, ended, saved = time.monotonic(), "finished", self.step
        log_path = run / "log.jsonl" if self.ranks.leader else Path(os.devnull)
        if self.ranks.leader:
            truncate_log(log_path, self.step)
        self.model.train()
        with open(log_path, "a", encoding="utf-8") as log:
            try:
                while self.step < self.limits.steps:
                    if self.limits.time_s is not None and self.ranks.any(time.monotonic() - began >= self.limits.time_s):
                        ended = "time limit"
                        break
                    report = self.advance()
                    log.write(json.dumps(asdict(report)) + "\n")
                    log.flush()
                    on_step(report)
                    if self.step % self.limits.save_every == 0:
                        self.save(run)
                        saved = self.step
            except KeyboardInterrupt:
                # a step that was cut in half leaves gradients and, when fused, parameters half way: the checkpoint before it is the truth
                say(f"interrupted at step {self.step + 1}; --resume goes on from step {saved}")
                raise
        if self.step != saved:
            self.save(run)
        return ended


def truncate_log(path: Path, step: int) -> None:
    """Leaves the lines of steps up to `step`: what came after a checkpoint comes again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # the line that a kill cut off
            continue
    partial = path.with_name(path.name + ".new")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
