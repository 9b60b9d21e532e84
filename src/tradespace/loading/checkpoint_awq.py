"""Reads AWQ checkpoints in AutoAWQ's "gemm" layout (arXiv:2306.00978): 4 bits with zero points in groups.

Stored transposed, of a linear M with weight (R, C): M.qweight int32 (C, R/8), M.scales fp16 (G, R), M.qzeros int32 (G, R/8). Within each word nibble i holds
row ORDER[i] of its eight, as the kernel that it was made for wants it. The activation-aware scales are folded into the weights before: nothing is left of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.loading.checkpoint_compressed import grouped_codes
from tradespace.loading.checkpoint_settings import Settings, grouped_format, skip_matcher
from tradespace.loading.checkpoint_tensors import FLOATS, Part, Stored, read_strip, repeat_groups
from tradespace.loading.safetensors import SafetensorsFile
from tradespace.spec.formats import find_format

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# which kernels run it, how layers are fused, and what transformers adds of GPTQ's settings
INERT = (
    "fuse_max_seq_len", "do_fuse", "modules_to_fuse", "exllama_config", "damp_percent", "true_sequential", "model_seqlen", "pad_token_id", "max_input_length",
    "cache_block_outputs", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "dataset", "tokenizer", "meta", "act_group_aware",
    "sym",
)  # fmt: skip


class AWQ:
    """The convention; `source` is None while only a plan is made."""

    def __init__(self, config: Mapping[str, Any], source: SafetensorsFile | None):
        self.source = source
        self.notes: list[str] = []
        settings = Settings(config)
        settings.one_of("quant_method", "awq")
        settings.one_of("bits", 4)
        settings.one_of("zero_point", True, default=True)
        for key in ("version", "format"):
            settings.one_of(key, "gemm", "GEMM", default="gemm")
        settings.one_of("backend", "autoawq", "auto", default="autoawq")
        settings.one_of("desc_act", False, default=False)
        if settings.raw("modules_in_block_to_quantize") is not None:
            raise settings.refused("modules_in_block_to_quantize", "not supported here")
        self.group = settings.whole("group_size", default=128, low=-1, high=2**22)
        self.fmt, self.repeat = grouped_format(settings, "group_size", 4, self.group, zero_points=True)
        self.skipped = skip_matcher(settings, "modules_to_not_convert")
        settings.inert(*INERT)
        settings.finish()

    def format_of(self, module: str, *, whole: Sequence[str]) -> str | None:
        plain = module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "wpe", "word_embeddings")
        return None if plain or self.skipped(module) else self.fmt

    def stored(self, module: str, shape: tuple[int, int], *, whole: Sequence[str]) -> Stored:
        rows, columns = shape
        groups = 1 if self.group == -1 else columns // self.group
        if rows % 8 or (self.group > 0 and columns % self.group):
            field = "bits = 4: rows must be a multiple of 8" if rows % 8 else f"group_size = {self.group} must divide the width"
            raise UnsupportedError(f"{module}: {rows} x {columns} weights, quantization_config.{field}")
        parts = (
            Part("qweight", ("I32",), ((columns, rows // 8),)),
            Part("scales", FLOATS, ((groups, rows),)),
            Part("qzeros", ("I32",), ((groups, rows // 8),)),
        )
        return Stored(fmt=self.fmt, parts=parts, read=lambda start, stop: self._codes(module, columns, start, stop), row_bytes=8 * columns + 16 * groups)

    def _codes(self, module: str, columns: int, start: int, stop: int) -> Codes:
        assert self.source is not None
        scales = self.source.tensors[f"{module}.scales"]
        scale_RG = read_strip(scales, (0, scales.shape[0]), (start, stop)).T.float()
        group = find_format(self.fmt).group
        assert group
        num_groups = -(-columns // group)
        zero_RG = repeat_groups(self._unpacked(f"{module}.qzeros", start, stop), self.repeat, num_groups).contiguous()
        codes_RC = self._unpacked(f"{module}.qweight", start, stop)
        return grouped_codes(codes_RC, repeat_groups(scale_RG, self.repeat, num_groups), zero_RG, 4, group, f"{module}.scales")

    def _unpacked(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a matrix stored transposed, eight rows to a word."""
        assert self.source is not None
        tensor = self.source.tensors[name]
        first, last = start // 8, -(-stop // 8)
        words_CW = read_strip(tensor, (0, tensor.shape[0]), (first, last))
        codes_RC = torch.empty((last - first) * 8, tensor.shape[0], dtype=torch.uint8)
        for nibble, row in enumerate(ORDER):
            codes_RC[row::8] = (words_CW >> 4 * nibble & 15).T.to(torch.uint8)
        return codes_RC[start - first * 8 : stop - first * 8]
