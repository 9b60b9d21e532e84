"""int4, int3, int2 in groups along a row: w ≈ (code - zero) · scale, a 16-bit float scale per group; zero points of `bits` bits or, symmetric, 2^(bits - 1).

C·b/8 + G·2 (+ G·b/8) bytes a row of C weights in G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.formats.codes import Codes, in_groups
from tradespace.formats.packing import pack, unpack
from tradespace.formats.quantized import Part
from tradespace.spec.formats import WeightFormat


@dataclass(frozen=True, slots=True)
class AffineCodec:
    """Parts: `weight` and, with zero points, `zero` as streams of bits (see packing.py); `scale` in fp16."""

    fmt: WeightFormat
    row_scale = False

    def rotation(self, columns: int) -> None:
        return None

    def parts(self, columns: int) -> dict[str, Part]:
        groups = self.fmt.groups(columns)
        found = {"weight": Part(torch.uint8, self.fmt.row_bytes(columns)), "scale": Part(torch.float16, groups)}
        if self.fmt.zero_bits:
            found["zero"] = Part(torch.uint8, -(-groups * self.fmt.zero_bits // 8))
        return found

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        found = {"weight": pack(codes.codes_RC, int(self.fmt.bits)), "scale": codes.need_scale()}
        assert (codes.zero_RG is not None) == bool(self.fmt.zero_bits), f"{self.fmt.name}: zero points are a matter of the format"
        if codes.zero_RG is not None:
            found["zero"] = pack(codes.zero_RG, self.fmt.zero_bits)
        return found

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> Codes:
        zero_RG = unpack(parts["zero"], self.fmt.zero_bits, self.fmt.groups(columns)) if self.fmt.zero_bits else None
        return Codes(unpack(parts["weight"], int(self.fmt.bits), columns), parts["scale"].float(), zero_RG)

    def decode(self, codes: Codes, out_RC: Tensor) -> None:
        out_RC.copy_(codes.codes_RC)
        scale_RG = codes.need_scale()
        if codes.zero_RG is None:
            out_RC.sub_(2 ** (int(self.fmt.bits) - 1))
        for values_RGC, groups in in_groups(out_RC, self.fmt.group or 0):
            if codes.zero_RG is not None:
                values_RGC.sub_(codes.zero_RG[:, groups, None].float())
            values_RGC.mul_(scale_RG[:, groups, None])
