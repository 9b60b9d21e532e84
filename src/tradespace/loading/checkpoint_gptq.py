"""Reads GPTQ checkpoints as AutoGPTQ and GPTQModel write them (arXiv:2210.17323): 2, 3, 4 bits in groups, 8 bits with one scale per row.

Stored transposed, of a linear M with weight (R, C) and b bits: M.qweight int32 (C·b/32, R), a dense bit stream along the input; M.scales fp16 (G, R);
M.qzeros int32 (G, R·b/32) along the output; M.g_idx int32 (C,), the group of each column. In `checkpoint_format` "gptq" a stored zero point is one less
than it means, in "gptq_v2" it is what it says.

With act-order the columns of a group lie scattered. Our groups are runs of columns, so such a matrix is held as floats, dequantized as the checkpoint's own
kernels do, and a note says so: its file is small, its memory is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.loading.checkpoint_compressed import grouped_codes
from tradespace.loading.checkpoint_settings import Settings, grouped_format
from tradespace.loading.checkpoint_tensors import FLOATS, Part, Stored, read_strip, repeat_groups, unpack_words
from tradespace.loading.rawfile import shown
from tradespace.loading.safetensors import SafetensorsFile
from tradespace.spec.formats import find_format
from tradespace.spec.model import ModelSpec

DENSE_OF = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
DTYPE_OF = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# how the codes were found, and which of somebody's kernels should run them
INERT = (
    "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "model_name_or_path", "model_file_base_name", "meta", "quantizer", "batch_size",
    "dataset", "tokenizer", "model_seqlen", "pad_token_id", "max_input_length", "cache_block_outputs", "block_name_to_quantize", "use_cuda_fp16",
    "module_name_preceding_first_block", "use_exllama", "exllama_config", "disable_exllama", "backend", "act_group_aware", "mse", "nsamples", "use_marlin",
)  # fmt: skip


class GPTQ:
    """The convention. Without a `source`, a plan takes act-order at its word; with one, it looks at each module's columns."""

    def __init__(self, config: Mapping[str, Any], source: SafetensorsFile | None, spec: ModelSpec):
        self.source, self.spec = source, spec
        self.notes: list[str] = []
        settings = Settings(config)
        settings.one_of("quant_method", "gptq")
        self.bits = settings.one_of("bits", 2, 3, 4, 8)
        self.group = settings.whole("group_size", default=128, low=-1, high=2**22)
        self.act_order = settings.one_of("desc_act", True, False, default=False)
        self.symmetric = settings.one_of("sym", True, False, default=True)
        layouts = {settings.one_of(key, "gptq", "gptq_v2", default="gptq") for key in ("checkpoint_format", "format") if settings.raw(key) is not None}
        if len(layouts) > 1:
            raise settings.refused("checkpoint_format", "format says otherwise")
        self.zero_added = 0 if layouts == {"gptq_v2"} else 1
        settings.one_of("is_marlin_format", False, default=False)
        settings.one_of("pack_dtype", "int32", default="int32")
        self.head = settings.one_of("lm_head", True, False, default=False)
        if settings.raw("dynamic") not in (None, {}):
            raise settings.refused("dynamic", "modules with settings of their own are not read here")
        blocks = settings.raw("modules_in_block_to_quantize", [])
        if not isinstance(blocks, list) or not all(isinstance(part, str | list) for part in blocks):
            raise settings.refused("modules_in_block_to_quantize", "a list of lists of module names is needed")
        self.only = tuple(str(name) for part in blocks for name in ([part] if isinstance(part, str) else part))
        settings.inert(*INERT)
        if self.bits == 8:
            if self.group != -1:
                raise settings.refused("group_size", "8-bit integers are held with one scale per row (-1)")
            if not self.symmetric:
                raise settings.refused("sym", "8-bit integers are held symmetric")
            self.fmt, self.repeat = "int8", 1
        else:
            self.fmt, self.repeat = grouped_format(settings, "group_size", self.bits, self.group, zero_points=not self.symmetric)
        settings.finish()

    def format_of(self, module: str, *, whole: Sequence[str]) -> str | None:
        ending = module.rpartition(".")[2]
        if ending in ("embed_tokens", "wte", "wpe", "word_embeddings") or (ending == "lm_head" and not self.head):
            return None
        if self.only and ending != "lm_head" and not module.endswith(self.only):
            return None
        return self._dense(module) if self._scattered(module) else self.fmt

    def _scattered(self, module: str) -> bool:
        """Whether the columns of a group do not lie together."""
        if self.source is None:
            return self.act_order and self.group != -1
        tensor = self.source.tensors.get(f"{module}.g_idx")
        if tensor is None or self.group == -1 or tensor.dtype != "I32" or len(tensor.shape) != 1:
            return False  # a misshapen one is refused when the parts are checked
        found_C = read_strip(tensor, (0, tensor.shape[0])).view(-1)
        return not torch.equal(found_C, torch.arange(len(found_C), dtype=torch.int32) // self.group)

    def _dense(self, module: str) -> str:
        stored = self.source.tensors.get(f"{module}.scales") if self.source is not None else None
        return DENSE_OF.get(stored.dtype, self.spec.stored_dtype) if stored is not None else self.spec.stored_dtype

    def stored(self, module: str, shape: tuple[int, int], *, whole: Sequence[str]) -> Stored:
        rows, columns = shape
        groups = 1 if self.group == -1 else -(-columns // self.group)
        per_run = 32 // self.bits if 32 % self.bits == 0 else 32
        if columns % per_run or rows % per_run:
            raise UnsupportedError(f"{module}: {rows} x {columns} weights of quantization_config.bits = {self.bits} do not fill whole 32-bit words")
        parts = [
            Part("qweight", ("I32",), ((columns * self.bits // 32, rows),)),
            Part("scales", FLOATS, ((groups, rows),)),
            Part("qzeros", ("I32",), ((groups, rows * self.bits // 32),)),
        ]
        if self.source is not None and f"{module}.g_idx" in self.source.tensors:
            parts.append(Part("g_idx", ("I32",), ((columns,),)))
        fmt = self.format_of(module, whole=whole)
        assert fmt is not None
        read = self._values if find_format(fmt).group is None else self._codes
        row_bytes = 12 * columns + 24 * groups + (16 * columns if read == self._values else 0)
        return Stored(fmt=fmt, parts=tuple(parts), read=lambda start, stop: read(module, columns, start, stop), row_bytes=row_bytes)

    def _raw(self, module: str, columns: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (n, C), scales (n, G) fp32 and zero points (n, G) as numbers."""
        assert self.source is not None
        tensors = self.source.tensors
        qweight, scales, qzeros = (tensors[f"{module}.{name}"] for name in ("qweight", "scales", "qzeros"))
        codes_RC = unpack_words(read_strip(qweight, (0, qweight.shape[0]), (start, stop)).T, self.bits, columns)
        scale_RG = read_strip(scales, (0, scales.shape[0]), (start, stop)).T.float()
        first, last = start // 32 * 32, min(-(-stop // 32) * 32, qweight.shape[1])
        words_GW = read_strip(qzeros, (0, qzeros.shape[0]), (first * self.bits // 32, -(-last * self.bits // 32)))
        zero_RG = unpack_words(words_GW, self.bits, last - first).T[start - first : stop - first].to(torch.int16) + self.zero_added
        if self.symmetric and (zero_RG != 2 ** (self.bits - 1)).any():
            what = f"tensor {shown(module + '.qzeros')} has zero points beside the middle"
            raise CorruptFileError(f"{self.source.path}: {what}, but quantization_config.sym is true")
        if (zero_RG >= 2**self.bits).any():
            raise UnsupportedError(f"tensor {shown(module + '.qzeros')}: quantization_config.checkpoint_format 'gptq' has zero points beyond the codes here")
        return codes_RC, scale_RG, zero_RG

    def _codes(self, module: str, columns: int, start: int, stop: int) -> Codes:
        codes_RC, scale_RG, zero_RG = self._raw(module, columns, start, stop)
        if self.bits == 8:
            return Codes((codes_RC.short() - 128).to(torch.int8), scale_RG.contiguous())
        group = find_format(self.fmt).group
        assert group
        num_groups = -(-columns // group)
        zeros = None if self.symmetric else repeat_groups(zero_RG.to(torch.uint8), self.repeat, num_groups).contiguous()
        return grouped_codes(codes_RC, repeat_groups(scale_RG, self.repeat, num_groups), zeros, self.bits, group, f"{module}.scales")

    def _values(self, module: str, columns: int, start: int, stop: int) -> Tensor:
        assert self.source is not None
        index = self.source.tensors[f"{module}.g_idx"]
        group_C = read_strip(index, (0, columns)).view(-1).long()
        codes_RC, scale_RG, zero_RG = self._raw(module, columns, start, stop)
        if group_C.min() < 0 or group_C.max() >= scale_RG.shape[1]:
            raise CorruptFileError(f"{self.source.path}: tensor {shown(module + '.g_idx')} names a group beyond the {scale_RG.shape[1]} there are")
        note = "act-order (desc_act) scatters the columns of a group: those matrices are held as floats, dequantized"
        if note not in self.notes:
            self.notes.append(note)
        values_RC = (codes_RC.short() - zero_RG[:, group_C]).float().mul_(scale_RG[:, group_C])
        # rounded where the checkpoint's own dequantization rounds: to the dtype of its scales
        return values_RC.to(DTYPE_OF[self.source.tensors[f"{module}.scales"].dtype]).float()
