"""A student learns its teacher's distribution: KL divergence over the whole vocabulary, forward or reverse, at a temperature. arXiv:1503.02531, 2306.08543

Logits of both exist for a chunk of tokens at a time. The gradient is scaled by the temperature squared, so that its size does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.model.transformer import Transformer
from tradespace.spec.model import ModelSpec
from tradespace.train.data import IGNORED, MicroBatch
from tradespace.train.loop import Objective
from tradespace.train.loss import ChunkLoss, chunked_loss, cross_entropy

LOGIT_BYTES = 4 * 4  # four in fp32 at once: the student's, both at their temperature, and a distribution
DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """share: of the divergence in the loss, the rest is plain cross entropy."""

    direction: str = "forward"
    temperature: float = 2.0
    share: float = 0.7

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise InputError(f"--kl {self.direction}: known are {', '.join(DIRECTIONS)}")
        if not 0 < self.temperature <= 100 or not 0 <= self.share <= 1:
            raise InputError("--temperature lies above 0 and at most at 100, --share between 0 and 1")


def divergence(teacher: Transformer, teacher_TD: Tensor, targets_T: Tensor, choice: Distillation) -> ChunkLoss:
    """The loss of a chunk of the student's logits."""
    plain = cross_entropy(targets_T)
    temperature = choice.temperature

    def chunk(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            theirs_CV = _log_softmax_(teacher.logits(teacher_TD[rows]).div_(temperature))
        ours_CV = _log_softmax_(logits_CV / temperature)
        seen_C1 = (targets_T[rows] != IGNORED)[:, None]
        if choice.direction == "forward":
            p_CV = theirs_CV.exp()
            each_C = torch.einsum("cv,cv->c", p_CV, theirs_CV.sub_(ours_CV))
            gradient_CV = ours_CV.exp_().sub_(p_CV)
            del p_CV
        else:
            q_CV, apart_CV = ours_CV.exp(), ours_CV.sub_(theirs_CV)
            each_C = torch.einsum("cv,cv->c", q_CV, apart_CV)
            gradient_CV = q_CV.mul_(apart_CV.sub_(each_C[:, None]))
            del apart_CV
        del theirs_CV, ours_CV  # the plain loss needs their room
        loss = (each_C * seen_C1[:, 0]).sum() * temperature**2
        gradient_CV.mul_(seen_C1 * (temperature * choice.share))
        if choice.share == 1.0:
            return loss, gradient_CV
        hard, hard_CV = plain(logits_CV, rows)
        return choice.share * loss + (1 - choice.share) * hard, gradient_CV.add_(hard_CV, alpha=1 - choice.share)

    return chunk


def _log_softmax_(logits_CV: Tensor) -> Tensor:
    """In place."""
    return logits_CV.sub_(logits_CV.logsumexp(dim=-1, keepdim=True))


def distillation(teacher: Transformer, choice: Distillation, loss_tokens: int) -> Objective:
    """The objective of a run. Raises InputError for a teacher of another vocabulary."""

    def loss(model: Transformer, micro: MicroBatch, scale: float) -> Tensor:
        if teacher.spec.V != model.spec.V:
            raise InputError(f"the teacher knows {teacher.spec.V} tokens, the student {model.spec.V}; their distributions cannot be compared")
        with torch.no_grad():
            teacher_TD = teacher(micro.tokens_T, micro.positions_T, micro.batch)
        hidden_TD = model(micro.tokens_T, micro.positions_T, micro.batch)
        return chunked_loss(model, hidden_TD, divergence(teacher, teacher_TD, micro.targets_T, choice), scale=scale, chunk=loss_tokens)

    return loss


def kept_layers(L: int, count: int) -> list[int]:
    """Which of a teacher's L layers a student of `count` starts from: evenly spread, first and last among them.

    >>> kept_layers(30, 4)
    [0, 10, 19, 29]
    """
    if not 1 <= count <= L:
        raise InputError(f"a student of {count} layers cannot begin as layers of a teacher that has {L}")
    return [0] if count == 1 else [round(index * (L - 1) / (count - 1)) for index in range(count)]


@torch.no_grad()
def begin_as_teacher(student: Transformer, teacher: Transformer, layers: Sequence[int]) -> None:
    """Copies embedding, norms, head and the named layers. Raises InputError where the widths differ."""
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        parts = name.split(".")
        source = ".".join([parts[0], str(layers[int(parts[1])]), *parts[2:]]) if parts[0] == "layers" else name
        if source not in theirs or theirs[source].shape != parameter.shape:
            raise InputError(
                f"the student cannot begin as its teacher: {name} {list(parameter.shape)} has no counterpart. Only the number of layers may differ"
            )
        parameter.copy_(theirs[source])


def dropped(spec: ModelSpec, count: int) -> ModelSpec:
    """The student's spec: the teacher's with the kept layers."""
    from dataclasses import replace

    kept = kept_layers(spec.L, count)
    return replace(spec, name=f"{spec.name}-{count}-layers", layers=tuple(spec.layers[index] for index in kept))
