"""What passes between those who choose codes (`quantize/`, `loading/`) and those who hold them (`formats/`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Codes:
    """A run of R rows of C columns of a weight, unpacked. The value of a code is (code - zero) · scale, unless its format says otherwise.

    codes_RC   int2/3/4: uint8, 0 … 2^bits - 1 · int8, w8a8: int8, -127 … 127 · nf4: uint8, index 0 … 15 · fp8: float8_e4m3fn · fp32, bf16, fp16: the floats
               GGUF blocks and e8: uint8 [R, row bytes], as `spec.formats` counts them
    scale_RG   fp32, G groups a row: 1 for formats with a scale per row or per matrix (then repeated for every row). None where codes hold all there is
    zero_RG    uint8 zero points of int2/3/4; None: symmetric, the zero point is 2^(bits - 1)
    nested_RG  nf4 only: uint8 codes of the scales, which are then DYNAMIC[nested] · scale_RG + offset. None: scale_RG is the scale
    offset     nf4 only, with nested_RG
    """

    codes_RC: Tensor
    scale_RG: Tensor | None = None
    zero_RG: Tensor | None = None
    nested_RG: Tensor | None = None
    offset: float = 0.0

    def __len__(self) -> int:
        return len(self.codes_RC)

    def __getitem__(self, rows: slice | Tensor) -> Codes:
        """These rows of the run, as views where a slice asks for them."""
        scale_RG, zero_RG, nested_RG = (None if part is None else part[rows] for part in (self.scale_RG, self.zero_RG, self.nested_RG))
        return Codes(self.codes_RC[rows], scale_RG, zero_RG, nested_RG, self.offset)

    def need_scale(self) -> Tensor:
        assert self.scale_RG is not None, "these codes come without scales"
        return self.scale_RG


def spread(per_group_RG: Tensor, group: int, columns: int) -> Tensor:
    """[R, G] → [R, columns]: each group's number at each of its columns, the last group cut short. group 0: one number a row, broadcast."""
    if group == 0 or per_group_RG.shape[1] == 1:
        return per_group_RG.expand(-1, columns)
    return per_group_RG.repeat_interleave(group, dim=1)[:, :columns]


def in_groups(values_RC: Tensor, group: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [R, some groups, columns of a group] of contiguous rows, and which groups those are: all whole ones, then a short one. 0: whole rows."""
    columns = values_RC.shape[1]
    group = min(group or columns, columns)
    whole = columns // group
    yield values_RC[:, : whole * group].unflatten(1, (whole, group)), slice(0, whole)
    if columns % group:
        yield values_RC[:, whole * group :].unsqueeze(1), slice(whole, whole + 1)


def group_extremes(values_RC: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, [R, G] each; the last group may be short. group 0: the whole row."""
    columns = values_RC.shape[1]
    group = group or columns
    whole = columns // group * group
    low_RG, high_RG = values_RC[:, :whole].unflatten(1, (-1, group)).aminmax(dim=2) if whole else (values_RC[:, :0], values_RC[:, :0])
    if whole < columns:
        low_R, high_R = values_RC[:, whole:].aminmax(dim=1, keepdim=True)
        low_RG, high_RG = torch.cat([low_RG, low_R], dim=1), torch.cat([high_RG, high_R], dim=1)
    return low_RG, high_RG
