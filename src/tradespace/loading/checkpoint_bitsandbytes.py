"""Reads 4-bit checkpoints of bitsandbytes in the nf4 format (arXiv:2305.14314), with plain or doubly quantized scales.

Of a linear M with weight (R, C): M.weight uint8 (R·C/2, 1), two codes a byte, the first in the high half; M.weight.absmax, a scale per 64 weights, fp32, or
uint8 codes of an 8-bit table (nested_quant_map) times M.weight.nested_absmax fp32 per 256 of them, plus an offset; M.weight.quant_map, the sixteen levels;
M.weight.quant_state.bitsandbytes__nf4, JSON as bytes: shape, block sizes, offset. Each matrix has its own offset, and one of ours that is made of several
(q, k, v) can have but one: it keeps the scales in fp32 then (nf4-plain), which is the same values in 4.5 bits instead of 4.127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.formats.nf4 import dynamic_levels, levels
from tradespace.loading.checkpoint_settings import Settings, skip_matcher
from tradespace.loading.checkpoint_tensors import Part, Stored, read_strip
from tradespace.loading.rawfile import shown
from tradespace.loading.safetensors import SafetensorsFile

BLOCK, NESTED = 64, 256
STATE = "weight.quant_state.bitsandbytes__nf4"
MAX_STATE_BYTES = 4096
DTYPES = ("float32", "float16", "bfloat16")


class BitsAndBytes:
    """The convention. Which modules it left alone is told by the files; without them, all but the head and the skipped ones are taken for quantized."""

    def __init__(self, config: Mapping[str, Any], source: SafetensorsFile | None):
        self.source = source
        self.notes: list[str] = []
        settings = Settings(config)
        settings.one_of("quant_method", "bitsandbytes", default="bitsandbytes")
        for key, need in (("load_in_4bit", True), ("_load_in_4bit", True), ("load_in_8bit", False), ("_load_in_8bit", False)):
            settings.one_of(key, need, default=need)
        settings.one_of("bnb_4bit_quant_type", "nf4")
        settings.one_of("bnb_4bit_quant_storage", "uint8", default="uint8")
        settings.one_of("bnb_4bit_compute_dtype", *DTYPES, default="float32")  # the plan's dtype of activations takes its place
        self.nested = settings.one_of("bnb_4bit_use_double_quant", True, False, default=False)
        self.skipped = skip_matcher(settings, "llm_int8_skip_modules")
        settings.inert("llm_int8_threshold", "llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload")  # of 8 bits
        settings.finish()

    def format_of(self, module: str, *, whole: Sequence[str]) -> str | None:
        if self.source is not None:
            if f"{module}.{STATE}" not in self.source.tensors:
                return None
            if self.skipped(module):
                raise UnsupportedError(f"quantization_config.llm_int8_skip_modules names {module}, which is stored quantized. Refused: one of them is wrong")
        elif self.skipped(module) or module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "wpe", "word_embeddings"):
            return None
        return "nf4" if self.nested and len(whole) < 2 else "nf4-plain"

    def stored(self, module: str, shape: tuple[int, int], *, whole: Sequence[str]) -> Stored:
        assert self.source is not None
        rows, columns = shape
        if columns % BLOCK:
            raise UnsupportedError(f"{module}: blocks of {BLOCK} run over the ends of rows of {columns} (quant_state.blocksize); here a row begins a block")
        groups = columns // BLOCK
        offset = self._offset(module, shape)
        parts = [
            Part("weight", ("U8",), ((rows * columns // 2, 1), (1, rows * columns // 2))),
            Part("weight.absmax", ("U8",) if self.nested else ("F32",), ((rows * groups,),)),
            Part("weight.quant_map", ("F32",), ((16,),)),
            Part(STATE, ("U8",), (self.source.tensors[f"{module}.{STATE}"].shape,)),
        ]
        if self.nested:
            parts += [Part("weight.nested_absmax", ("F32",), ((-(-rows * groups // NESTED),),)), Part("weight.nested_quant_map", ("F32",), ((256,),))]
        fmt = self.format_of(module, whole=whole)
        assert fmt is not None
        return Stored(
            fmt=fmt,
            parts=tuple(parts),
            read=lambda start, stop: self._codes(module, columns, start, stop, offset, fmt),
            row_bytes=4 * columns + 32 * groups,
        )

    def _offset(self, module: str, shape: tuple[int, int]) -> float:
        """Reads the JSON beside a weight; the offset of its scales, 0 where they are plain."""
        assert self.source is not None
        tensor = self.source.tensors[f"{module}.{STATE}"]
        what = f"{self.source.path}: tensor {shown(tensor.name)}"
        if tensor.dtype != "U8" or not 2 <= tensor.nbytes <= MAX_STATE_BYTES:
            raise CorruptFileError(f"{what} must be JSON in at most {MAX_STATE_BYTES} bytes; it is {tensor.nbytes} as {tensor.dtype}")
        try:
            values = json.loads(bytes(read_strip(tensor, (0, tensor.nbytes)).view(-1).tolist()))
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{what} is not JSON ({type(error).__name__}). Fetch it again") from error
        state = Settings(values, path=f"{module}.weight.quant_state")
        state.one_of("quant_type", "nf4")
        state.one_of("blocksize", BLOCK)
        state.one_of("dtype", *DTYPES)
        if state.raw("shape") != list(shape):
            raise state.refused("shape", f"the model's is {list(shape)}")
        offset = state.raw("nested_offset", 0.0)
        if not isinstance(offset, float) or (state.raw("nested_blocksize") is not None) != self.nested:
            raise state.refused("nested_offset", f"quantization_config.bnb_4bit_use_double_quant is {self.nested}")
        if self.nested:
            state.one_of("nested_blocksize", NESTED)
            state.one_of("nested_dtype", "float32")
        state.finish()
        return offset

    def _codes(self, module: str, columns: int, start: int, stop: int, offset: float, fmt: str) -> Codes:
        assert self.source is not None
        tensors, groups, count = self.source.tensors, columns // BLOCK, stop - start
        cpu = torch.device("cpu")
        self._check_table(f"{module}.weight.quant_map", levels(cpu))
        weight = tensors[f"{module}.weight"]
        if weight.shape[0] == 1:  # one row of bytes
            bytes_RB = read_strip(weight, (0, 1), (start * columns // 2, stop * columns // 2)).view(count, -1)
        else:
            bytes_RB = read_strip(weight, (start * columns // 2, stop * columns // 2)).view(count, -1)
        codes_RC = torch.stack([bytes_RB >> 4, bytes_RB & 15], dim=-1).flatten(1)
        absmax_RG = read_strip(tensors[f"{module}.weight.absmax"], (start * groups, stop * groups)).view(count, groups)
        if not self.nested:
            return Codes(codes_RC, absmax_RG)
        table = dynamic_levels(cpu)
        self._check_table(f"{module}.weight.nested_quant_map", table)
        first = start * groups // NESTED
        nested_N = read_strip(tensors[f"{module}.weight.nested_absmax"], (first, -(-stop * groups // NESTED))).view(-1)
        places_RG = torch.arange(start * groups, stop * groups).view(count, groups) // NESTED - first
        scale_RG = nested_N[places_RG]
        if fmt == "nf4":
            return Codes(codes_RC, scale_RG, nested_RG=absmax_RG, offset=offset)
        return Codes(codes_RC, table[absmax_RG.int()] * scale_RG + torch.tensor(offset))

    def _check_table(self, name: str, need: Tensor) -> None:
        assert self.source is not None
        if not torch.equal(read_strip(self.source.tensors[name], (0, len(need))).view(-1), need):
            raise UnsupportedError(f"tensor {shown(name)} is another table of levels than the published one")
