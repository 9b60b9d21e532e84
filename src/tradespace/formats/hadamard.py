"""Random Hadamard rotation of a row: signs, then a Hadamard matrix on blocks of columns. It spreads outliers, so that every row looks drawn from a normal law.

x @ W.T = (x Q) @ (W Q).T for any orthogonal Q: rotated weights are multiplied with rotated activations, and nobody ever needs W itself (arXiv:2402.04396).
Q = diag(signs) · (H_b ⊕ H_b ⊕ …) / √b, b the largest power of two that divides the width (576 = 9 · 64: nine blocks of 64; an odd width only gets signs).
Signs are a hash of the seed and the column: the same on every machine and in every version. Cost: C · log2(b) additions a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SEED = 0x7EADE5
_WORD = 2**64 - 1


def block_size(columns: int) -> int:
    """The largest power of two that divides `columns`.

    >>> block_size(576), block_size(2048), block_size(7)
    (64, 2048, 1)
    """
    return columns & -columns


def _hash(number: int) -> int:
    """64 well-mixed bits of a 64-bit number: Vigna's splitmix64."""
    number = (number + 0x9E3779B97F4A7C15) & _WORD
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _WORD
    return number ^ (number >> 31)


def signs(columns: int, seed: int = SEED) -> Tensor:
    """+1 or -1 for each column, fp32."""
    return torch.tensor([1.0 - 2.0 * (_hash((seed << 32) + column) & 1) for column in range(columns)])


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, scaled to be orthogonal: symmetric, its own inverse. fp32 [size, size]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5


@dataclass(frozen=True, eq=False)
class Rotation:
    """Q for one width."""

    signs_C: Tensor

    def _blocks(self, x_TC: Tensor) -> Tensor:
        """x @ (H_b ⊕ H_b ⊕ …) / √b in fp32: log2(b) rounds of sums and differences, in the same order for every row."""
        shape, block, half = x_TC.shape, block_size(x_TC.shape[-1]), 1
        while half < block:
            pairs_TN2H = x_TC.view(len(x_TC), shape[-1] // (2 * half), 2, half)
            left_TNH, right_TNH = pairs_TN2H[:, :, 0], pairs_TN2H[:, :, 1]
            x_TC = torch.stack([left_TNH + right_TNH, left_TNH - right_TNH], dim=2)
            half *= 2
        return x_TC.view(shape).mul(block**-0.5)

    def apply(self, x_TC: Tensor) -> Tensor:
        """x @ Q, computed in fp32 (four copies of x), in x's dtype. A row's result does not depend on the others."""
        return self._blocks(x_TC.float() * self.signs_C.to(x_TC.device)).to(x_TC.dtype)

    def undo(self, x_TC: Tensor) -> Tensor:
        """x @ Q.T, for fp32."""
        return self._blocks(x_TC).mul_(self.signs_C.to(x_TC.device))


@lru_cache(maxsize=64)
def rotation_of(columns: int) -> Rotation:
    """Q for rows of this width, shared by all weights that have it."""
    return Rotation(signs(columns))
