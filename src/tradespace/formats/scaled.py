"""One number of 8 bits per weight, times a scale: int8 (-127 … 127) or fp8 e4m3 (at most 448), a scale per row, per matrix or per 128 x 128 block, in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import EngineError
from tradespace.formats.codes import Codes, group_extremes, in_groups
from tradespace.formats.quantized import Part, QuantizedWeight
from tradespace.spec.formats import WeightFormat

# the largest magnitude of a code
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, slots=True)
class ScaledCodec:
    """Parts: `weight` in `element`, `scale` for as many rows and columns as `fmt` says."""

    fmt: WeightFormat
    element: torch.dtype

    @property
    def row_scale(self) -> bool:
        return self.fmt.group == 0

    @property
    def largest(self) -> float:
        return LARGEST[self.element]

    def rotation(self, columns: int) -> None:
        return None

    def parts(self, columns: int) -> dict[str, Part]:
        return {"weight": Part(self.element, columns), "scale": Part(torch.float32, self.fmt.groups(columns), self.fmt.scale_rows)}

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        return {"weight": codes.codes_RC, "scale": codes.need_scale()}

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> Codes:
        return Codes(parts["weight"], parts["scale"])

    def decode(self, codes: Codes, out_RC: Tensor) -> None:
        out_RC.copy_(codes.codes_RC)
        if not self.row_scale:
            for values_RGC, groups in in_groups(out_RC, self.fmt.group or 0):
                values_RGC.mul_(codes.need_scale()[:, groups, None])


class ScaledWeight(QuantizedWeight):
    """As `QuantizedWeight`. Rows that share a scale with others may be filled apart once `observe` has seen them all."""

    codec: ScaledCodec
    scale: Tensor
    observed = False
    _known_B: Tensor | None = None  # scales that rows have been filled with

    @property
    def spans_rows(self) -> bool:
        """Whether a scale belongs to more than one row."""
        return self.fmt.scale_rows != 1

    @torch.no_grad()
    def set_rows(self, rows: slice | Tensor, codes: Codes) -> None:
        """As `QuantizedWeight`. Raises EngineError where a scale that spans rows would change under rows that are held already, or is not the same for all."""
        if not self.spans_rows:
            super().set_rows(rows, codes)
            return
        places, before_BG = self._places(self.parts["scale"], rows), self._flat("scale").clone()
        assert isinstance(places, Tensor), "scales that span rows are found by index"
        super().set_rows(rows, codes)
        every = self._places(self.parts["scale"], slice(None))
        assert isinstance(every, Tensor), "scales that span rows are found by index"
        given_B, whole_B = (ids.bincount(minlength=len(before_BG)) for ids in (places, every))
        known_B = self._known_B if self._known_B is not None else torch.zeros_like(given_B, dtype=torch.bool)
        changed_B = (self._flat("scale") != before_BG).any(dim=1) & known_B & (given_B < whole_B)
        if changed_B.any() or not torch.equal(self._flat("scale")[places], codes.need_scale()):
            raise EngineError(f"rows that share a scale in {self.format_name} were given different ones; give all of them at once, with one scale")
        self._known_B = known_B | (given_B > 0)

    @torch.no_grad()
    def observe(self, rows: slice | Tensor, values_RC: Tensor) -> None:
        """Widens the scales that span rows to what these rows need: max|w| over the largest code. The first call forgets what the weight held.

        Takes a few numbers a row.
        """
        scale_BG, part = self._flat("scale"), self.parts["scale"]
        if not self.observed:
            scale_BG.zero_()
            self.observed = True
        low_RG, high_RG = group_extremes(values_RC, self.fmt.group or 0)
        needed_RG = torch.maximum(-low_RG, high_RG).float().div_(self.codec.largest)
        places = self._places(part, rows)
        assert isinstance(places, Tensor), "scales that span rows are found by index"
        scale_BG.scatter_reduce_(0, places[:, None].expand_as(needed_RG), needed_RG, "amax")

    def scales_of(self, rows: slice | Tensor) -> Tensor:
        """scale_RG as held, a row of them for each of these rows."""
        return self._flat("scale")[self._places(self.parts["scale"], rows)]
