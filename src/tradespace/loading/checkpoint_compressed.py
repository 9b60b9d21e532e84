"""Reads compressed-tensors checkpoints: pack-quantized, int-quantized, float-quantized and naive-quantized weights, one config group or several.

Layouts as `compressed_tensors` writes them. A group's `targets` and the `ignore` list name modules, patterns ("re:…") or the class Linear; of several that
match, a name wins over a pattern and a pattern over the class. Its symmetric code of b bits is value / scale, stored plus 2^(b - 1): what ours is, too.
8-bit floats with activations quantized on the fly run here with the activations as they are: nearer to the unquantized model, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tradespace.errors import CorruptFileError
from tradespace.formats.codes import Codes
from tradespace.loading.checkpoint_settings import Settings, grouped_format, name_matcher
from tradespace.loading.checkpoint_tensors import (
    FLOATS,
    Part,
    Stored,
    half_scales,
    read_packed_rows,
    read_strip,
    repeat_groups,
    unpack_whole_codes,
    unpack_words,
)
from tradespace.loading.compressed_tensors import FOLDED
from tradespace.loading.safetensors import SafetensorsFile

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings")
MAX_GROUPS = 256
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One config group: what its modules become, and how they are stored."""

    fmt: str
    packed: bool
    bits: int = 8
    group: int = 0  # columns of a stored scale; -1: the whole row, 0: the whole matrix
    repeat: int = 1
    zero_points: bool = False
    folded: bool = False  # zero points are in the codes, which have one bit more than `fmt` (as `loading/compressed_tensors` writes them)


class CompressedTensors:
    """The convention; `source` is None while only a plan is made."""

    def __init__(self, config: Mapping[str, Any], source: SafetensorsFile | None):
        self.source = source
        self.notes: list[str] = []
        settings = Settings(config)
        settings.one_of("quant_method", "compressed-tensors")
        settings.one_of("quantization_status", "compressed", "frozen")
        settings.inert("version", "global_compression_ratio", "run_compressed")
        dequantizes = settings.one_of("dequantize", True, False, default=False)  # as transformers loads
        for key in ("kv_cache_scheme", "moe_sparsity_config"):
            if settings.raw(key) is not None:
                raise settings.refused(key, "not supported here")
        for key in ("transform_config", "sparsity_config"):
            value = settings.raw(key, {})
            if value != {} and not (key == "sparsity_config" and isinstance(value, Mapping) and value.get("format") == "dense"):
                raise settings.refused(key, "transformed or sparse weights are not supported here")
        overall = settings.one_of("format", *FORMATS, "mixed-precision")
        groups = settings.section("config_groups")
        if not 1 <= len(groups.values) <= MAX_GROUPS:
            raise settings.refused("config_groups", f"1 to {MAX_GROUPS} groups are needed")
        self.exact: dict[str, Scheme] = {}
        self.patterns: list[tuple[str, Any, Scheme]] = []
        self.classes: dict[str, Scheme] = {}
        for key in groups.values:
            self._add_group(groups, key, overall)
        if dequantizes and any(scheme.fmt == "w8a8" for scheme in (*self.exact.values(), *self.classes.values(), *(entry[2] for entry in self.patterns))):
            raise settings.refused("dequantize", "it leaves out what input_activations ask for")
        ignored = settings.names("ignore")
        self.ignored = name_matcher(settings, "ignore", ignored)
        self.ignored_classes = {name for name in ignored if re.fullmatch(r"[A-Z]\w*", name)}
        if not self.ignored_classes <= {"Linear", "Embedding"}:
            raise settings.refused("ignore", "of the classes of modules only Linear and Embedding are known here")
        settings.finish()

    def _add_group(self, groups: Settings, key: Any, overall: str) -> None:
        if not isinstance(groups.values[key], Mapping):
            raise groups.refused(str(key), "a named preset is not read here: it must be spelled out as a dictionary")
        group = groups.section(key)
        targets = group.names("targets")
        scheme = self._scheme(group, group.one_of("format", *FORMATS, default=None if overall == "mixed-precision" else overall))
        for target in targets:
            if target.startswith("re:"):
                self.patterns.append((target, name_matcher(group, "targets", [target]), scheme))
                continue
            if target in self.exact or target in self.classes:
                raise group.refused("targets", f"{target[:80]} has two schemes")
            if re.fullmatch(r"[A-Z]\w*", target):
                if target not in ("Linear", "Embedding"):
                    raise group.refused("targets", f"of the classes of modules only Linear and Embedding are known here, not {target[:80]}")
                self.classes[target] = scheme
            else:
                self.exact[target] = scheme
        self.patterns.sort(key=lambda entry: entry[0])
        group.finish()

    def _scheme(self, group: Settings, compression: str) -> Scheme:
        if group.raw("output_activations") is not None:
            raise group.refused("output_activations", "not supported here")
        weights = group.section("weights")
        weights.inert("observer", "observer_kwargs")
        folded = isinstance(weights.raw("observer_kwargs"), Mapping) and FOLDED in weights.raw("observer_kwargs")
        told = weights.section("observer_kwargs").one_of(FOLDED, 2, 3, 4) if folded else 0
        kind = weights.one_of("type", "int", "float", default="int")
        bits = weights.one_of("num_bits", *((told + 1,) if folded else (2, 3, 4, 8)), default=8)
        symmetric = weights.one_of("symmetric", True, False, default=True)
        weights.one_of("dynamic", False, default=False)
        weights.one_of("actorder", "weight", "static", False, default=False)
        weights.one_of("scale_dtype", "torch.float16", "torch.bfloat16", "torch.float32", default="torch.float32")
        weights.one_of("zp_dtype", "torch.int8", "torch.float8_e4m3fn", default="torch.int8")
        group_size = weights.whole("group_size", default=0, low=-1, high=2**22)
        strategy = weights.one_of(
            "strategy", "tensor", "channel", "group", "block", default="group" if group_size > 0 else "channel" if group_size == -1 else "tensor"
        )
        absent = weights.raw("group_size") is None
        if not (group_size > 0 if strategy == "group" else absent or (strategy == "channel" and group_size == -1)):
            raise weights.refused("group_size", f"does not go with strategy {strategy}")
        if weights.raw("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}") if strategy == "block" else weights.raw("block_structure") is not None:
            raise weights.refused("block_structure", f"blocks are {BLOCK} x {BLOCK}, and only of strategy block")
        weights.finish()
        if (compression == "float-quantized") != (kind == "float") and compression != "naive-quantized":
            raise weights.refused("type", f"does not go with format {compression}")
        activations = self._activations(group)
        if kind == "float":
            if bits != 8 or not symmetric or strategy == "group":
                raise weights.refused("strategy" if strategy == "group" else "symmetric" if bits == 8 else "num_bits", "read here: e4m3, symmetric")
            if activations not in (None, "float"):
                raise group.refused("input_activations", "8-bit integers beside 8-bit float weights")
            return Scheme(fmt={"channel": "fp8", "tensor": "fp8-tensor", "block": "fp8-block"}[strategy], packed=False, group={"channel": -1}.get(strategy, 0))
        if strategy == "block":
            raise weights.refused("strategy", "blocks of integers are not held here")
        packed = compression == "pack-quantized"
        if bits == 8 or not packed:
            if bits != 8 or not symmetric or strategy == "group":
                key = "num_bits" if bits != 8 else "group_size" if strategy == "group" else "symmetric"
                raise weights.refused(key, "8-bit integers are held symmetric, with one scale per row or per matrix")
            fmt = "int8" if strategy == "channel" else "int8-tensor"
            if activations == "int":
                fmt = "w8a8"
            elif activations is not None:
                raise group.refused("input_activations", "8-bit floats beside integer weights")
            return Scheme(fmt=fmt, packed=packed, group=-1 if strategy == "channel" else 0)
        if activations is not None:
            raise group.refused("input_activations", f"{bits}-bit weights run here with activations as they are")
        if strategy == "tensor" and not symmetric:
            raise weights.refused("symmetric", "a zero point for the whole matrix is not read here")
        if folded and (strategy != "group" or not symmetric):
            raise weights.refused("observer_kwargs", "folded zero points are read in groups, symmetric")
        columns = group_size if strategy == "group" else -1
        fmt, repeat = grouped_format(weights, "group_size", bits - folded, columns, zero_points=folded or not symmetric)
        stored_group = {"group": group_size, "channel": -1, "tensor": 0}[strategy]
        return Scheme(fmt=fmt, packed=True, bits=bits, group=stored_group, repeat=repeat, zero_points=not symmetric, folded=folded)

    def _activations(self, group: Settings) -> str | None:
        """None: left alone; "int": int8, one scale per token; "float": 8-bit floats on the fly, which we leave out."""
        if group.raw("input_activations") is None:
            return None
        inputs = group.section("input_activations")
        inputs.inert("observer", "observer_kwargs")
        kind = inputs.one_of("type", "int", "float", default="int")
        inputs.one_of("num_bits", 8, default=8)
        inputs.one_of("dynamic", True)
        inputs.one_of("symmetric", True, default=True)
        strategies = ("token",) if kind == "int" else ("token", "tensor", "group")
        strategy = inputs.one_of("strategy", *strategies)
        if strategy == "group":
            inputs.whole("group_size", low=1, high=2**22)
        elif inputs.raw("group_size") is not None:
            raise inputs.refused("group_size", f"does not go with strategy {strategy}")
        for key in ("block_structure", "actorder", "scale_dtype"):
            if inputs.raw(key) is not None:
                raise inputs.refused(key, "not supported here")
        inputs.one_of("zp_dtype", "torch.int8", "torch.float8_e4m3fn", default="torch.int8")
        inputs.finish()
        if kind == "float":
            note = "fp8 weights run with unquantized activations; the checkpoint asks for activations in fp8, which lose a little more"
            if note not in self.notes:
                self.notes.append(note)
        return kind

    def _scheme_of(self, module: str) -> Scheme | None:
        owner = "Embedding" if module.rpartition(".")[2] in EMBEDDINGS else "Linear"
        if self.ignored(module) or owner in self.ignored_classes:
            return None
        matching = (scheme for _, matches, scheme in self.patterns if matches(module))
        return self.exact.get(module) or next(matching, None) or self.classes.get(owner)

    def format_of(self, module: str, *, whole: Sequence[str]) -> str | None:
        scheme = self._scheme_of(module)
        if scheme is None:
            return None
        # a part of a larger matrix brings its own scale, so a row's scale it becomes
        return {"int8-tensor": "int8", "fp8-tensor": "fp8"}.get(scheme.fmt, scheme.fmt) if len(whole) > 1 else scheme.fmt

    def stored(self, module: str, shape: tuple[int, int], *, whole: Sequence[str]) -> Stored:
        scheme = self._scheme_of(module)
        fmt = self.format_of(module, whole=whole)
        assert scheme is not None and fmt is not None, f"{module} is not quantized"
        rows, columns = shape
        groups = 1 if scheme.group < 1 else -(-columns // scheme.group)
        if scheme.group > 0 and columns % scheme.group:
            raise CorruptFileError(f"{module}: group_size {scheme.group} does not divide the width {columns}, as compressed-tensors demands")
        scale_shapes: tuple[tuple[int, ...], ...] = ((rows, groups),) if scheme.group else ((1,), ())
        if scheme.group == -1:
            scale_shapes = ((rows, 1), (rows,))
        if scheme.fmt == "fp8-block":
            scale_shapes = ((-(-rows // BLOCK), -(-columns // BLOCK)),)
        parts = [Part("weight_scale", FLOATS, scale_shapes)]
        if not scheme.packed:
            parts.append(Part("weight", ("F8_E4M3",) if scheme.fmt.startswith("fp8") else ("I8",), (shape,)))
        else:
            dense, loose = -(-columns * scheme.bits // 32), -(-columns // (32 // scheme.bits))
            parts += [Part("weight_packed", ("I32",), ((rows, dense), (rows, loose))), Part("weight_shape", ("I64", "I32"), ((2,),))]
            if scheme.zero_points:
                shapes = ((-(-rows * scheme.bits // 32), groups), (-(-rows // (32 // scheme.bits)), groups))
                parts.append(Part("weight_zero_point", ("I32",), shapes))
        read = (lambda start, stop: self._packed(module, shape, scheme, start, stop)) if scheme.packed else (
            lambda start, stop: self._plain(module, scheme, start, stop)
        )  # fmt: skip
        return Stored(fmt=fmt, parts=tuple(parts), read=read, row_bytes=8 * columns + 16 * groups)

    def _tensor(self, name: str):
        assert self.source is not None
        return self.source.tensors[name]

    def _scales(self, module: str, scheme: Scheme, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensor(f"{module}.weight_scale")
        if scheme.fmt == "fp8-block":
            blocks = read_strip(tensor, (start // BLOCK, -(-stop // BLOCK))).float()
            return blocks[torch.arange(start, stop) // BLOCK - start // BLOCK]
        if scheme.group == 0:
            return read_strip(tensor, (0, 1)).float().expand(stop - start, 1)
        return read_strip(tensor, (start, stop)).float()

    def _plain(self, module: str, scheme: Scheme, start: int, stop: int) -> Codes:
        return Codes(read_strip(self._tensor(f"{module}.weight"), (start, stop)), self._scales(module, scheme, start, stop))

    def _packed(self, module: str, shape: tuple[int, int], scheme: Scheme, start: int, stop: int) -> Codes:
        assert self.source is not None
        columns, bits = shape[1], scheme.bits
        said = read_strip(self._tensor(f"{module}.weight_shape"), (0, 2)).view(-1).tolist()
        if said != list(shape):
            raise CorruptFileError(f"{self.source.path}: tensor {module}.weight_shape says {said}; the model's shape is {list(shape)}")
        packed = self._tensor(f"{module}.weight_packed")
        unpack = unpack_words if packed.shape[1] == -(-columns * bits // 32) else unpack_whole_codes
        codes_RC = unpack(read_strip(packed, (start, stop)), bits, columns)
        scale_RG = self._scales(module, scheme, start, stop)
        if bits == 8:
            return Codes((codes_RC.short() - 128).to(torch.int8), scale_RG)
        num_groups = -(-columns // _group(scheme.fmt))
        scale_RG = repeat_groups(scale_RG, scheme.repeat, num_groups)
        zero_RG = None
        if scheme.zero_points:
            zero_RG = read_packed_rows(self.source, f"{module}.weight_zero_point", (start, stop), bits, unpack)
            zero_RG = repeat_groups(zero_RG, scheme.repeat, num_groups).contiguous()
        if scheme.folded:
            bits -= 1
            codes_RC, zero_RG = unfolded(codes_RC, bits, _group(scheme.fmt), f"{self.source.path}: tensor {module}.weight_packed")
        return grouped_codes(codes_RC, scale_RG, zero_RG, bits, _group(scheme.fmt), f"{module}.weight_scale")


def _group(fmt: str) -> int:
    return int(fmt.split("-g")[1].removesuffix("-zp"))


def unfolded(codes_RC: torch.Tensor, bits: int, group: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, zero points) of `bits` whose differences are those of the folded codes (difference + 2^bits): the smallest zero points that do.

    Raises CorruptFileError where a group's differences span more than codes of `bits` do.
    """
    differences = codes_RC.short().unflatten(1, (-1, group)) - 2**bits
    zeros = (-differences.amin(-1)).clamp_min(0)
    codes = differences + zeros.unsqueeze(-1)
    if int(zeros.max()) >= 2**bits or int(codes.max()) >= 2**bits:
        raise CorruptFileError(f"{where}: a group spans more than {2**bits} codes, which {FOLDED} = {bits} excludes")
    return codes.flatten(1).to(torch.uint8), zeros.to(torch.uint8)


def grouped_codes(codes_RC: torch.Tensor, scale_RG: torch.Tensor, zero_RG: torch.Tensor | None, bits: int, group: int, name: str) -> Codes:
    """Codes with scales that our grouped formats can hold exactly, or UnsupportedError."""
    if not scale_RG.isfinite().all() or (scale_RG.half().float() == scale_RG).all():  # who loads them refuses what is not finite, with its own words
        return Codes(codes_RC, scale_RG.contiguous(), zero_RG)
    zeros_RG = torch.full_like(scale_RG, 2 ** (bits - 1), dtype=torch.uint8) if zero_RG is None else zero_RG
    padded = torch.nn.functional.pad(codes_RC, (0, -codes_RC.shape[1] % group), value=255).unflatten(1, (-1, group))
    is_zero_RG = ((padded == zeros_RG.unsqueeze(-1)) | (padded == 255)).all(dim=-1)
    return Codes(codes_RC, half_scales(scale_RG, is_zero_RG, name), zero_RG)
