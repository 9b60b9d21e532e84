"""Reads fp8 checkpoints with a scale per block of 128 × 128, as DeepSeek-V3 (arXiv:2412.19437) and Qwen3 publish them: quant_method "fp8".

Of a linear M with weight (R, C): M.weight float8_e4m3fn (R, C) and M.weight_scale_inv (ceil(R/128), ceil(C/128)), which despite its name is what a code is
multiplied with. The published kernels quantize activations on the fly, too; here they stay as they are, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tradespace.formats.codes import Codes
from tradespace.loading.checkpoint_settings import Settings, skip_matcher
from tradespace.loading.checkpoint_tensors import Part, Stored, read_strip
from tradespace.loading.safetensors import SafetensorsFile

BLOCK = 128


class BlockFP8:
    """The convention; `source` is None while only a plan is made."""

    def __init__(self, config: Mapping[str, Any], source: SafetensorsFile | None):
        self.source = source
        self.notes: list[str] = []
        settings = Settings(config)
        settings.one_of("quant_method", "fp8")
        settings.one_of("fmt", "e4m3", default="e4m3")
        settings.one_of("activation_scheme", "dynamic", default="dynamic")
        settings.one_of("scale_fmt", "float", "ue8m0", default="float")
        settings.one_of("expert_dtype", "fp8", default="fp8")
        settings.one_of("dequantize", False, default=False)
        if settings.raw("weight_block_size", [BLOCK, BLOCK]) not in ([BLOCK, BLOCK], (BLOCK, BLOCK)):
            raise settings.refused("weight_block_size", f"blocks are {BLOCK} x {BLOCK}")
        if settings.raw("modules_to_convert") is not None:
            raise settings.refused("modules_to_convert", "not supported here")
        skips = [skip_matcher(settings, key) for key in ("modules_to_not_convert", "ignored_layers")]
        self.skipped = lambda module: any(skip(module) for skip in skips)
        settings.finish()
        self.notes.append("fp8 weights run with unquantized activations; the checkpoint asks for activations in fp8, which lose a little more")

    def format_of(self, module: str, *, whole: Sequence[str]) -> str | None:
        plain = module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "wpe", "word_embeddings")
        return None if plain or self.skipped(module) else "fp8-block"

    def stored(self, module: str, shape: tuple[int, int], *, whole: Sequence[str]) -> Stored:
        rows, columns = shape
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        parts = (Part("weight", ("F8_E4M3",), (shape,)), Part("weight_scale_inv", ("F32", "BF16", "F16", "F8_E8M0"), (blocks,)))
        return Stored(fmt="fp8-block", parts=parts, read=lambda start, stop: self._codes(module, start, stop), row_bytes=columns + 8 * blocks[1])

    def _codes(self, module: str, start: int, stop: int) -> Codes:
        assert self.source is not None
        codes_RC = read_strip(self.source.tensors[f"{module}.weight"], (start, stop))
        scale_BG = read_strip(self.source.tensors[f"{module}.weight_scale_inv"], (start // BLOCK, -(-stop // BLOCK))).float()
        return Codes(codes_RC, scale_BG[torch.arange(start, stop) // BLOCK - start // BLOCK])
