"""nf4: 16 quantiles of the normal law, scaled by the largest magnitude of each 64 weights (arXiv:2305.14314), bit for bit as bitsandbytes holds them.

nf4-plain keeps a block's scale in fp32: 4.5 bits a weight. nf4 quantizes the scales, too: less their mean over the whole tensor (`offset`), in groups of 256
that share an fp32 scale, to 8-bit dynamic codes (arXiv:1511.04561): 4.127 bits. bitsandbytes' blocks run on over the ends of rows; ours do not, so both agree
where the width is a multiple of 64, and otherwise a row ends in a short block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tradespace.errors import EngineError
from tradespace.formats.codes import Codes, in_groups
from tradespace.formats.packing import pack, unpack
from tradespace.formats.quantized import Codec, Part, QuantizedWeight
from tradespace.formats.workspace import Workspace
from tradespace.kernels.linear.levels import LEVELS
from tradespace.spec.formats import WeightFormat

# the CPU library finds a scale's code in a table over [-1, 1] with this many entries, which only matters for codes below 1e-4
LOOKUP = 2**16


@lru_cache(maxsize=8)
def levels(device: torch.device) -> Tensor:
    """The 16 values of a code."""
    return torch.tensor(LEVELS, device=device)


@lru_cache(maxsize=8)
def dynamic_levels(device: torch.device) -> Tensor:
    """The 256 values of a scale's code: 0, 1, and of each sign seven decades with 1, 2, 4 … 64 steps, each step in its middle. fp32, ascending."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)).tolist()
        found += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@lru_cache(maxsize=1)
def _dynamic_lookup() -> Tensor:
    """The code of the level nearest to each of LOOKUP numbers from -1 to 1."""
    table = dynamic_levels(torch.device("cpu"))
    points = -1 + 2 * torch.arange(LOOKUP, dtype=torch.float32) / (LOOKUP - 1)
    return torch.bucketize(points, 0.5 * (table[:-1] + table[1:])).to(torch.uint8)


def quantize_scales(scale_N: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [N], group scales fp32 [ceil(N / group)], offset fp32 []) of the fp32 scales of a whole tensor. About 40 bytes a scale on the way."""
    offset = scale_N.mean()
    padded_NG = torch.nn.functional.pad(scale_N - offset, (0, -len(scale_N) % group)).view(-1, group)
    largest_N = padded_NG.abs().amax(dim=1)
    unit_NG = (padded_NG * (1 / largest_N).unsqueeze(1)).clamp_(-1, 1)
    # position = 65535 · (unit + 1) / 2 + 1/2 in one rounding, as the fused multiply-add has it; a group of equal scales gets code 0 of scale 0
    position_NG = (((unit_NG + 1) * 0.5).double().mul_(LOOKUP - 1).add_(0.5)).float().nan_to_num_(0.0).long()
    codes_NG = _dynamic_lookup().to(scale_N.device)[position_NG].masked_fill_((largest_N == 0).unsqueeze(1), 0)
    return codes_NG.flatten()[: len(scale_N)], largest_N, offset


@dataclass(frozen=True, slots=True)
class NF4Codec:
    """Parts: `weight`, two codes a byte, the first one in the high half; `scale`: fp32, or uint8 where nested (NF4Weight holds what those refer to)."""

    fmt: WeightFormat
    row_scale = False

    def rotation(self, columns: int) -> None:
        return None

    def parts(self, columns: int) -> dict[str, Part]:
        scale = torch.uint8 if self.fmt.nested else torch.float32
        return {"weight": Part(torch.uint8, self.fmt.row_bytes(columns)), "scale": Part(scale, self.fmt.groups(columns))}

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        swapped_RB = pack(codes.codes_RC, 4)
        scale_RG = codes.need_scale() if codes.nested_RG is None else codes.nested_RG
        return {"weight": (swapped_RB << 4) | (swapped_RB >> 4), "scale": scale_RG}

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> Codes:
        packed_RB = parts["weight"]
        return Codes(unpack((packed_RB << 4) | (packed_RB >> 4), 4, columns), parts["scale"])

    def decode(self, codes: Codes, out_RC: Tensor) -> None:
        scale_RG = codes.need_scale()
        if codes.nested_RG is not None:
            scale_RG = dynamic_levels(scale_RG.device)[codes.nested_RG.int()] * scale_RG + codes.offset
        # gather: three times as fast as indexing
        torch.gather(levels(out_RC.device).expand(len(out_RC), -1), 1, codes.codes_RC.long(), out=out_RC)
        for values_RGC, groups in in_groups(out_RC, self.fmt.group or 0):
            values_RGC.mul_(scale_RG[:, groups, None])


class NF4Weight(QuantizedWeight):
    """Doubly quantized scales. Their mean is known once all rows are: until then the fp32 scales wait beside the weight, 4 bytes for each 64 weights of it."""

    offset: Tensor
    nested_scale: Tensor
    scale: Tensor

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        linear: str = "torch",
        workspace: Workspace | None = None,
    ):
        """As `QuantizedWeight`."""
        super().__init__(codec, shape, dtype, device=device, linear=linear, workspace=workspace)
        self.num_groups = codec.fmt.groups(shape[-1])
        num_nested = -(-self.num_rows * self.num_groups // codec.fmt.nested)
        self.register_buffer("nested_scale", torch.empty(num_nested, dtype=torch.float32, device=self.weight.device))
        self.register_buffer("offset", torch.empty(1, dtype=torch.float32, device=self.weight.device))
        self._waiting_RG: Tensor | None = None
        self._missing_R: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.nested_scale.nbytes + self.offset.nbytes

    def _nested_places(self, rows: slice | Tensor) -> Tensor:
        """Which nested scale each scale of these rows refers to."""
        ids_R = torch.arange(self.num_rows, device=self.weight.device)[rows]
        return (ids_R[:, None] * self.num_groups + torch.arange(self.num_groups, device=self.weight.device)) // self.fmt.nested

    @torch.no_grad()
    def set_rows(self, rows: slice | Tensor, codes: Codes) -> None:
        """Fills whole rows. With plain scales (`nested_RG` None) the weight can be read once every row has been filled."""
        if codes.nested_RG is not None:
            super().set_rows(rows, codes)
            self.nested_scale[self._nested_places(rows)] = codes.need_scale()
            self.offset.fill_(codes.offset)
            return
        if self._waiting_RG is None or self._missing_R is None:
            self._waiting_RG = torch.empty(self.num_rows, self.num_groups, device=self.weight.device)
            self._missing_R = torch.ones(self.num_rows, dtype=torch.bool, device=self.weight.device)
        self._waiting_RG[rows] = codes.need_scale()
        self._missing_R[rows] = False
        super().set_rows(rows, Codes(codes.codes_RC, torch.zeros(len(codes), self.num_groups, dtype=torch.uint8, device=self.weight.device)))
        if not self._missing_R.any():
            scales, nested, offset = quantize_scales(self._waiting_RG.view(-1), self.fmt.nested)
            self.scale.view(-1).copy_(scales)
            self.nested_scale.copy_(nested)
            self.offset.fill_(offset)
            self._waiting_RG = self._missing_R = None

    def _codes(self, rows: slice | Tensor) -> Codes:
        if self._missing_R is not None:
            raise EngineError(f"nf4: {int(self._missing_R.sum())} of {self.num_rows} rows are not filled yet, and their scales decide how all are held")
        found = super()._codes(rows)
        return Codes(found.codes_RC, self.nested_scale[self._nested_places(rows)], nested_RG=found.scale_RG, offset=float(self.offset))
