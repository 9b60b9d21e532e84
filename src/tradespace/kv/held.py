"""What one layer holds of whole tokens, all heads alike: keys and values, or the layer's input from which both are projected. Retention decides which
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import EngineError
from tradespace.kernels.view import ProjectKV
from tradespace.kv.store.codec import Codec, read_into, write
from tradespace.spec.kv_workspace import DECODE_ROWS


@dataclass(frozen=True, slots=True)
class Step:
    """What a step brings to one layer: keys (T, K, H), values (T, K, Hv), and where it is what is held, the layer's input (T, D) and how to project it."""

    k_TKH: Tensor
    v_TKH: Tensor
    x_TD: Tensor | None = None
    project: ProjectKV | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Keys and values, each in a store of its own."""

    keys: Codec
    values: Codec
    key_planes: tuple[Tensor, ...]
    value_planes: tuple[Tensor, ...]

    def write(self, slots_X: Tensor, step: Step, rows_X: Tensor | slice) -> None:
        """Tokens `rows_X` of the step into `slots_X`."""
        write(self.keys, self.key_planes, slots_X, step.k_TKH[rows_X])
        write(self.values, self.value_planes, slots_X, step.v_TKH[rows_X])

    def read_into(self, slots: Tensor | slice, positions_S: Tensor | None, step: Step | None, k_SKH: Tensor, v_SKH: Tensor) -> None:
        """Keys and values of `slots`; positions and step are of no interest here."""
        read_into(self.keys, self.key_planes, slots, k_SKH)
        read_into(self.values, self.value_planes, slots, v_SKH)


@dataclass(frozen=True, slots=True)
class Input:
    """The layer's input, as one vector a token; keys and values are projected DECODE_ROWS tokens at a time."""

    codec: Codec
    planes: tuple[Tensor, ...]

    def write(self, slots_X: Tensor, step: Step, rows_X: Tensor | slice) -> None:
        assert step.x_TD is not None, "a layer gives its input to a view that holds inputs"
        write(self.codec, self.planes, slots_X, step.x_TD[rows_X][:, None])

    def read_into(self, slots: Tensor | slice, positions_S: Tensor | None, step: Step | None, k_SKH: Tensor, v_SKH: Tensor) -> None:
        """Keys and values of `slots`, which hold the tokens at `positions_S`."""
        if step is None or step.x_TD is None or step.project is None or positions_S is None:
            raise EngineError("this cache holds layers' inputs: only the layer itself can make keys and values of them")
        for start in range(0, len(k_SKH), DECODE_ROWS):
            stop = min(start + DECODE_ROWS, len(k_SKH))
            part = slice(slots.start + start, slots.start + stop) if isinstance(slots, slice) else slots[start:stop]
            x_S1D = torch.empty((stop - start, 1, step.x_TD.shape[1]), dtype=k_SKH.dtype, device=k_SKH.device)
            read_into(self.codec, self.planes, part, x_S1D)
            k_SKH[start:stop], v_SKH[start:stop] = step.project(x_S1D[:, 0], positions_S[start:stop])


Held = Pair | Input
