"""Sampling on a CUDA device as the sampler wants it (`SampleKernel`), over `triton_sample.py`: parameters go over in one transfer, tokens come back in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tradespace.kernels.sample import Shape
from tradespace.kernels.sample.triton_sample import DeviceSampling


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """What `DeviceSampling.draw` reads of some rows, on their device."""

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    key_R: Tensor
    with_top_k: bool
    with_top_p: bool

    @classmethod
    def of(cls, shapes: Sequence[Shape], keys: Sequence[int], device: torch.device | str) -> DrawnRows:
        """Of rows with these shapes and keys (`noise.noise_key`)."""
        held = np.empty((3, len(shapes)), np.int64)
        held[0] = keys
        floats = held[1:].view(np.float32).reshape(4, len(shapes))
        floats[0] = [shape.temperature for shape in shapes]
        floats[1] = [min(max(shape.top_k, 0), 2**23) for shape in shapes]  # beyond any vocabulary: off
        floats[2] = [shape.top_p for shape in shapes]
        floats[3] = [shape.min_p for shape in shapes]
        there = torch.from_numpy(held).to(device)
        numbers = there[1:].view(torch.float32).view(4, len(shapes))
        return cls(
            numbers[0], numbers[1].int(), numbers[2], numbers[3], there[0], any(shape.top_k > 0 for shape in shapes), any(shape.top_p < 1 for shape in shapes)
        )


class OnDevice:
    """A `SampleKernel` over logits that lie on a CUDA device."""

    name = "triton"

    def __init__(self, sampling: DeviceSampling):
        self.sampling = sampling

    def workspace_bytes(self, vocab_size: int) -> int:
        """Bytes held for the sampler's lifetime; a step adds none."""
        return self.sampling.nbytes

    def best(self, logits_RV: Tensor) -> list[int | None]:
        """The first index of each row's largest logit; None where that is not a finite number."""
        tokens_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
        return _known(self.sampling.greedy(logits_RV, tokens_R))

    def draw(self, logits_RV: Tensor, rows: Sequence[int], shapes: Sequence[Shape], keys: Sequence[int]) -> list[int | None]:
        """A token from each of these rows: the best where the temperature is 0, else a draw from what its shape leaves."""
        if not rows:
            return []
        if list(rows) != list(range(len(logits_RV))):
            logits_RV = logits_RV[torch.tensor(rows, device=logits_RV.device)]
        return _known(draw_rows(self.sampling, logits_RV, torch.empty(len(rows), dtype=torch.int64, device=logits_RV.device), shapes, keys))


def draw_rows(sampling: DeviceSampling, logits_RV: Tensor, tokens_R: Tensor, shapes: Sequence[Shape], keys: Sequence[int]) -> Tensor:
    """tokens_R, on the device: a draw for each row, the best where its temperature is 0. Nothing is waited for."""
    drawn = DrawnRows.of(shapes, keys, logits_RV.device)
    return sampling.draw(
        logits_RV,
        tokens_R,
        temperature_R=drawn.temperature_R,
        top_k_R=drawn.top_k_R,
        top_p_R=drawn.top_p_R,
        min_p_R=drawn.min_p_R,
        key_R=drawn.key_R,
        with_top_k=drawn.with_top_k,
        with_top_p=drawn.with_top_p,
    )


def _known(tokens_R: Tensor) -> list[int | None]:
    return [None if token < 0 else token for token in tokens_R.tolist()]
