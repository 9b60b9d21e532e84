"""Quantized weights → tensors and a `quantization_config` that other tools open: compressed-tensors where it has the format, else our own convention.

compressed-tensors (read by transformers and vLLM), of a linear module M with weight (R, C):

    int4 int3 int2, with or without zero points   pack-quantized: M.weight_packed int32 (R, ceil(C·bits/32)), M.weight_scale fp16 (R, groups),
                                                   M.weight_shape int64 [2], and of zero points M.weight_zero_point int32, packed along the rows
    int8 int8-tensor                               pack-quantized with 8 bits, a scale per row (R, 1) or one [1], fp32
    w8a8                                           int-quantized: M.weight int8, M.weight_scale fp32 (R, 1); activations quantized per token as they come
    fp8 fp8-tensor fp8-block                       float-quantized: M.weight float8_e4m3fn, M.weight_scale fp32 (R, 1), [1], or one per block of 128 × 128

It wants rows that are whole groups: int4-g128 with a width of 576 is refused. A mixture is one config group per format, naming its modules.

Zero points need care, because transformers (5.24, over compressed-tensors 0.20) makes room for unpacked ones and then finds them packed, whoever wrote them.
It opens them where it decodes the weights while it loads, which the config asks for ("dequantize"). That is done in the dtype of the scales, which are fp32
therefore; and by one scheme for all modules. So in a mixture zero points are folded: code - zero, which takes one bit more and is symmetric (int2-g64-zp
becomes 3 bits in groups of 64). `observer_kwargs` of such a group says from how many bits, and our reader finds zero points that give the same values again.

What it cannot say (nf4, e8, GGUF blocks, a quantized embedding), or a mixture with such a thing in it, has quant_method "tradespace":

    {"quant_method": "tradespace", "version": 1, "formats": {format: [module names]}, "ignore": [modules kept as floats]}

where the formats above keep their tensors. Every other has M.weight_codes: nf4 as a dense bit stream in int32 words, the others uint8 (R, bytes of a row), as
`spec.formats` counts them; and M.weight_scale fp32 (R, groups) where scales stand beside the codes. nf4 with doubly quantized scales has M.weight_nested uint8
(R, groups), M.weight_scale fp32, one for each 256 of those in the order of rows, M.weight_start int64 [1], how far into its run the first one lies, and
M.weight_offset fp32 [1]. A reader that does not know version or format must refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.loading.checkpoint_tensors import pack_words
from tradespace.spec.formats import WeightFormat, find_format

OWN_METHOD, OWN_VERSION = "tradespace", 1
BLOCK = 128  # rows and columns of an fp8 block
DENSE = ("fp32", "bf16", "fp16")
FLOAT8 = ("fp8", "fp8-tensor", "fp8-block")
# the layout follows compressed-tensors 0.9 and later; 3 bits are packed densely since 0.14
_TENSORS_VERSION = "0.14.0"
# in a group's observer_kwargs: how many bits its codes have when their zero points are not folded into them
FOLDED = "zero_points_folded_from_bits"


def is_integer(fmt: WeightFormat) -> bool:
    """Whole-number codes in groups, with two to four bits: int4-g64, int3-g128-zp …"""
    return fmt.name.startswith(("int2", "int3", "int4"))


def expressible(name: str) -> bool:
    """Whether compressed-tensors has this format."""
    return name in ("int8", "int8-tensor", "w8a8", *FLOAT8) or is_integer(find_format(name))


def folds(formats: Iterable[str]) -> bool:
    """Whether zero points are folded into codes, in a checkpoint with these formats of its modules: in a mixture that compressed-tensors can say.

    >>> folds(["int4-g64-zp", "bf16"]), folds(["int4-g64-zp", "int8"]), folds(["int4-g64-zp", "nf4"])
    (False, True, False)
    """
    coded = {find_format(name).name for name in formats} - set(DENSE)
    return len(coded) > 1 and all(map(expressible, coded))


def export_tensors(name: str, fmt_name: str, codes: Codes, shape: Sequence[int], *, fold: bool = False) -> dict[str, Tensor]:
    """The stored tensors of the linear module `name` (as its checkpoint calls it, without ".weight") whose weight, (R, C) = `shape`, is `codes`.

    `fold`: zero points into codes (see `folds`). Raises UnsupportedError, naming the field, where compressed-tensors has the format but not for this width.
    """
    rows, columns = shape
    fmt = find_format(fmt_name)
    scale_RG = codes.scale_RG
    if not expressible(fmt_name):
        return _own_tensors(name, fmt, codes)
    assert scale_RG is not None and len(scale_RG) == rows, f"{name}: {fmt_name} without a scale for each of {rows} rows"
    if is_integer(fmt):
        assert fmt.group
        if columns % fmt.group:
            raise UnsupportedError(
                f"{name}: compressed-tensors' group_size {fmt.group} must divide the width {columns}. "
                f"Use {'groups that do' if any(columns % group == 0 for group in (32, 64)) else 'another format for this module'}"
            )
        bits = fmt_bits(fmt)
        if codes.zero_RG is None:
            return _packed(name, codes.codes_RC, bits, shape) | {f"{name}.weight_scale": scale_RG.half()}
        if fold:
            folded_RC = codes.codes_RC + 2**bits - codes.zero_RG.repeat_interleave(fmt.group, dim=1)  # in uint8: at most 31
            return _packed(name, folded_RC, bits + 1, shape) | {f"{name}.weight_scale": scale_RG.half()}
        zeros = pack_words(codes.zero_RG.T.contiguous(), bits).T.contiguous()
        return _packed(name, codes.codes_RC, bits, shape) | {f"{name}.weight_scale": scale_RG.float().contiguous(), f"{name}.weight_zero_point": zeros}
    if fmt_name == "fp8-block":
        if columns % BLOCK:
            raise UnsupportedError(f"{name}: compressed-tensors' block_structure {BLOCK}x{BLOCK} must divide the width {columns}. Use fp8")
        scale = scale_RG[::BLOCK].float()
        if not torch.equal(scale.repeat_interleave(BLOCK, dim=0)[:rows], scale_RG.float()):
            raise UnsupportedError(f"{name}: blocks of fp8-block straddle its edge, which compressed-tensors' block_structure cannot say. Use fp8")
    elif fmt_name.endswith("-tensor"):
        scale = scale_RG.view(-1)[:1].float()
    else:
        scale = scale_RG.float()
    scales = {f"{name}.weight_scale": scale.contiguous()}
    if fmt_name in ("int8", "int8-tensor"):
        # packed as value + 128
        return _packed(name, (codes.codes_RC.short() + 128).to(torch.uint8), 8, shape) | scales
    return {f"{name}.weight": codes.codes_RC.contiguous()} | scales


def fmt_bits(fmt: WeightFormat) -> int:
    return int(fmt.name[3])


def _packed(name: str, codes_RC: Tensor, bits: int, shape: Sequence[int]) -> dict[str, Tensor]:
    return {f"{name}.weight_packed": pack_words(codes_RC, bits), f"{name}.weight_shape": torch.tensor(list(shape), dtype=torch.int64)}


def _own_tensors(name: str, fmt: WeightFormat, codes: Codes) -> dict[str, Tensor]:
    if fmt.name in DENSE:
        raise UnsupportedError(f"{name}: {fmt.name} has no codes to store; write its values as {name}.weight")
    found = {f"{name}.weight_codes": pack_words(codes.codes_RC, 4) if fmt.name.startswith("nf4") else codes.codes_RC.contiguous()}
    if codes.nested_RG is not None:
        scale_N = codes.need_scale().float().flatten()
        start = _run_start(scale_N, fmt.nested)
        return found | {
            f"{name}.weight_nested": codes.nested_RG.contiguous(),
            f"{name}.weight_scale": torch.cat([scale_N[:1], scale_N[fmt.nested - start :: fmt.nested]]),
            f"{name}.weight_start": torch.tensor([start], dtype=torch.int64),
            f"{name}.weight_offset": torch.tensor([codes.offset], dtype=torch.float32),
        }
    if codes.scale_RG is not None:
        found[f"{name}.weight_scale"] = codes.scale_RG.float().contiguous()
    return found


def _run_start(scale_N: Tensor, run: int) -> int:
    """How far into a run of `run` equal numbers the first one lies: these may be rows out of the middle of a matrix."""
    edges = (scale_N[1:] != scale_N[:-1]).nonzero().flatten() + 1
    start = int(-edges[0]) % run if len(edges) else 0
    assert not ((edges + start) % run).any(), "these scales do not share theirs in runs"
    return start


def _scheme(name: str, fold: bool) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """(compression format, weights, input_activations) of one of our formats."""
    fmt = find_format(name)
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
    if is_integer(fmt):
        bits = fmt_bits(fmt)
        weights |= {"num_bits": bits, "symmetric": not fmt.zero_bits, "strategy": "group", "group_size": fmt.group}
        if fmt.zero_bits and fold:
            weights |= {"num_bits": bits + 1, "symmetric": True, "observer_kwargs": {FOLDED: bits}}
        return "pack-quantized", weights, None
    if name.endswith("-tensor"):
        weights["strategy"] = "tensor"
    if name in FLOAT8:
        weights["type"] = "float"
        if name == "fp8-block":
            weights |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        return "float-quantized", weights, None
    if name == "w8a8":
        return "int-quantized", weights, {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
    return "pack-quantized", weights, None


def quantization_config(formats: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose modules (all that hold a matrix, named as the checkpoint does, dense ones too) have these formats.

    What is dense, and `lm_head` where it is not named, is ignored by name. Raises InputError for an unknown format.
    """
    by_format: dict[str, list[str]] = {}
    for module, name in formats.items():
        by_format.setdefault(find_format(name).name, []).append(module)
    ignore = [module for name in DENSE for module in by_format.pop(name, [])]
    if not any(_is_head(module) for module in formats):
        ignore.append("lm_head")
    # transformers finds no weight in an embedding whose codes are packed, and builds a tied head from a dense one
    embeds = any(_is_embedding(module) for modules in by_format.values() for module in modules)
    if embeds or not all(expressible(name) for name in by_format):
        return {"quant_method": OWN_METHOD, "version": OWN_VERSION, "formats": by_format, "ignore": ignore}
    # one format for every linear: the usual short form
    config = tensors_config({name: ["Linear"] for name in by_format} if len(by_format) == 1 else by_format, ignore, fold=folds(by_format))
    if any(not group["weights"]["symmetric"] for group in config["config_groups"].values()):
        config["dequantize"] = True
    return config


def tensors_config(targets: Mapping[str, Sequence[str]], ignore: Sequence[str], *, fold: bool = False) -> dict[str, Any]:
    """A config of compressed-tensors: one group for each format (all of them `expressible`), with these targets."""
    schemes = {name: _scheme(name, fold) for name in targets}
    compressions = {compression for compression, _, _ in schemes.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": _TENSORS_VERSION,
        "format": next(iter(compressions)) if len(compressions) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{index}": {
                "targets": list(targets[name]),
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
                "format": compression,
            }
            for index, (name, (compression, weights, activations)) in enumerate(schemes.items())
        },
        "ignore": list(ignore),
    }


def _is_head(module: str) -> bool:
    return module.rpartition(".")[2] == "lm_head"


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings")
