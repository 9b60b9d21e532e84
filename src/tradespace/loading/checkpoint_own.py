"""Reads checkpoints with quant_method "tradespace": what `loading/compressed_tensors` writes where compressed-tensors has no word for a format.

    {"quant_method": "tradespace", "version": 1, "formats": {format: [module names]}, "ignore": [modules kept as floats]}

Formats that compressed-tensors has keep its tensors, and are read by its reader. The others: M.weight_codes, and M.weight_scale where they have scales; nf4
with doubly quantized scales also M.weight_nested uint8 (R, groups) and M.weight_offset fp32 [1], its M.weight_scale being one fp32 per 256 scales. A matrix of
ours that was written as several modules keeps its runs of 256: M.weight_start, int64 [1], says how far into a run the module begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.formats.nf4 import dynamic_levels
from tradespace.loading.checkpoint_compressed import CompressedTensors
from tradespace.loading.checkpoint_settings import Settings
from tradespace.loading.checkpoint_tensors import Part, Stored, read_strip, unpack_words
from tradespace.loading.compressed_tensors import DENSE, OWN_METHOD, OWN_VERSION, expressible, tensors_config
from tradespace.loading.rawfile import shown
from tradespace.loading.safetensors import SafetensorsFile
from tradespace.spec.formats import FORMATS, WeightFormat, find_format, refusal

NESTED = FORMATS["nf4"].nested


class Own:
    """The convention; `source` is None while only a plan is made."""

    def __init__(self, config: Mapping[str, Any], source: SafetensorsFile | None):
        self.source = source
        self.notes: list[str] = []
        self.together: dict[tuple[str, ...], bool] = {}
        settings = Settings(config)
        settings.one_of("quant_method", OWN_METHOD)
        settings.one_of("version", OWN_VERSION)
        settings.names("ignore")
        formats = settings.section("formats")
        self.formats: dict[str, str] = {}
        for name in formats.values:
            if name not in FORMATS or name in DENSE:
                raise formats.refused(str(name), f"not a format that is read here. Known: {', '.join(key for key in FORMATS if key not in DENSE)}")
            for module in formats.names(name):
                if module in self.formats:
                    raise formats.refused(name, f"{module[:80]} has two formats")
                self.formats[module] = find_format(name).name
        formats.finish()
        settings.finish()
        known: dict[str, list[str]] = {}
        for module, name in self.formats.items():
            if expressible(name):
                known.setdefault(name, []).append(module)
        self.tensors = CompressedTensors(tensors_config(known, []), source) if known else None

    def format_of(self, module: str, *, whole: Sequence[str]) -> str | None:
        name = self.formats.get(module)
        if name is None:
            return None
        if self.tensors is not None and expressible(name):
            return self.tensors.format_of(module, whole=whole)
        return "nf4-plain" if name == "nf4" and len(whole) > 1 and self._is_nested(module) and not self._nested_together(tuple(whole)) else name

    def _is_nested(self, module: str) -> bool:
        return self.source is not None and f"{module}.weight_nested" in self.source.tensors

    def _nested_together(self, whole: tuple[str, ...]) -> bool:
        """Whether the scales of these modules, one after the other, are quantized as those of one matrix: one offset, one scale in each run of NESTED."""
        if whole not in self.together:
            assert self.source is not None
            parts = [f"{module}.{kind}" for module in whole for kind in ("weight_nested", "weight_scale", "weight_start", "weight_offset")]
            if all(self.formats.get(module) == "nf4" for module in whole) and all(part in self.source.tensors for part in parts):
                offsets = {self._number(f"{module}.weight_offset") for module in whole}
                scale_N = torch.cat([self._scales(module) for module in whole])
                runs = torch.nn.functional.pad(scale_N, (0, -len(scale_N) % NESTED), value=float(scale_N[-1])).view(-1, NESTED)
                self.together[whole] = len(offsets) == 1 and bool((runs == runs[:, :1]).all())
            else:
                self.together[whole] = False
        return self.together[whole]

    def _number(self, name: str) -> float:
        assert self.source is not None
        tensor = self.source.tensors[name]
        if tensor.shape != (1,):
            raise CorruptFileError(f"{self.source.path}: tensor {shown(name)} must be one number; it has shape {list(tensor.shape)}")
        return read_strip(tensor, (0, 1)).item()

    def _scales(self, module: str, rows: tuple[int, int] | None = None, groups: int = 1) -> Tensor:
        """What each doubly quantized scale of these rows is multiplied with, one after the other: a stored scale for each run of NESTED of the whole matrix."""
        assert self.source is not None
        scale, nested = (self.source.tensors[f"{module}.{kind}"] for kind in ("weight_scale", "weight_nested"))
        begin = int(self._number(f"{module}.weight_start"))
        first, last = (0, nested.shape[0] * nested.shape[-1]) if rows is None else (rows[0] * groups, rows[1] * groups)
        if not 0 <= begin < NESTED or scale.shape != (-(-(begin + nested.shape[0] * nested.shape[-1]) // NESTED),):
            raise CorruptFileError(
                f"{self.source.path}: tensor {shown(scale.name)} {list(scale.shape)} does not have a scale for each {NESTED} of {nested.name}"
            )
        start = (begin + first) // NESTED
        found = read_strip(scale, (start, -(-(begin + last) // NESTED))).view(-1)
        return found[(begin + torch.arange(first, last)) // NESTED - start]

    def stored(self, module: str, shape: tuple[int, int], *, whole: Sequence[str]) -> Stored:
        fmt = find_format(self.formats[module])
        if self.tensors is not None and expressible(fmt.name):
            return self.tensors.stored(module, shape, whole=whole)
        rows, columns = shape
        if reason := refusal(fmt, columns):
            raise UnsupportedError(f"{module}: quantization_config.formats: {reason}")
        packs, groups = fmt.name.startswith("nf4"), fmt.groups(columns)
        codes = (rows, -(-columns * 4 // 32)) if packs else (rows, fmt.row_bytes(columns))
        parts = [Part("weight_codes", ("I32",) if packs else ("U8",), (codes,))]
        if self._is_nested(module) and fmt.name == "nf4":
            assert self.source is not None
            scale = self.source.tensors.get(f"{module}.weight_scale")
            parts += [
                Part("weight_nested", ("U8",), ((rows, groups),)),
                # how many depends on where the first run begins: checked where they are read
                Part("weight_scale", ("F32",), ((1,) if scale is None else scale.shape,)),
                Part("weight_start", ("I64",), ((1,),)),
                Part("weight_offset", ("F32",), ((1,),)),
            ]
        elif fmt.group is not None:
            parts.append(Part("weight_scale", ("F32",), ((rows, groups),)))
        held = self.format_of(module, whole=whole)
        assert held is not None
        return Stored(
            fmt=held,
            parts=tuple(parts),
            read=lambda start, stop: self._codes(module, columns, fmt, held, start, stop),
            row_bytes=8 * columns + 32 * groups,
        )

    def _codes(self, module: str, columns: int, fmt: WeightFormat, held: str, start: int, stop: int) -> Codes:
        assert self.source is not None
        tensors, groups = self.source.tensors, fmt.groups(columns)
        codes_RC = read_strip(tensors[f"{module}.weight_codes"], (start, stop))
        if fmt.group is None:
            return Codes(codes_RC)
        if fmt.name.startswith("nf4"):
            codes_RC = unpack_words(codes_RC, 4, columns)
        scale = tensors[f"{module}.weight_scale"]
        if not (self._is_nested(module) and fmt.name == "nf4"):
            return Codes(codes_RC, read_strip(scale, (start, stop)))
        scale_RG = self._scales(module, (start, stop), groups).view(stop - start, groups)
        nested_RG = read_strip(tensors[f"{module}.weight_nested"], (start, stop))
        offset = self._number(f"{module}.weight_offset")
        if held == "nf4":
            return Codes(codes_RC, scale_RG, nested_RG=nested_RG, offset=offset)
        return Codes(codes_RC, dynamic_levels(scale_RG.device)[nested_RG.int()] * scale_RG + torch.tensor(offset))
