"""The methods by name, and one layer quantized by one of them. A method is three choices: whether the model is rotated, what is folded, how it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor

from tradespace.errors import InputError, UnsupportedError
from tradespace.formats import DTYPES, Codes, NativeWeight, build_weight, decode
from tradespace.quantize.awq import fold_awq
from tradespace.quantize.clip import affine_values, can_clip, clipped_grid
from tradespace.quantize.feedback import Factor
from tradespace.quantize.folds import Tensors
from tradespace.quantize.gptq import gptq, gptq_factor, takes_feedback
from tradespace.quantize.gram import Gram, output_error
from tradespace.quantize.grid import affine_grid, encode_affine
from tradespace.quantize.ldlq import lattice_factor, ldlq
from tradespace.quantize.rtn import round_to_nearest
from tradespace.quantize.smoothquant import fold_smooth
from tradespace.spec.formats import WeightFormat, find_format, refusal
from tradespace.spec.model import LayerSpec, ModelSpec
from tradespace.spec.tensors import TensorSpec, layer_tensors
from tradespace.spec.weights import WeightPlan

Rounding = Literal["nearest", "search", "clip", "gptq"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """rotate: by a random Hadamard matrix, residual stream and value heads. fold: scales per input channel. rounding: how codes are chosen. aims: whether
    each linear first makes good what the ones before it lost (`aiming.py`)."""

    name: str
    rounding: Rounding
    fold: Literal["awq", "smooth", "smooth-search"] | None = None
    rotate: bool = False
    aims: bool = False
    idea: str = ""

    @property
    def needs_text(self) -> bool:
        """Whether it learns from calibration text."""
        return self.fold is not None or self.rounding in ("clip", "gptq")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="rtn", rounding="nearest", idea="each group scaled by its largest magnitude; no text"),
        Method(name="rtn-search", rounding="search", idea="scales by least squared error; no text"),
        Method(name="gptq", rounding="gptq", idea="column by column, errors made good by the rest; arXiv:2210.17323, for e8 as arXiv:2402.04396"),
        Method(name="awq", rounding="clip", fold="awq", idea="channels that matter scaled up, ranges clipped; arXiv:2306.00978"),
        Method(name="awq-gptq", rounding="gptq", fold="awq", idea="awq's scales, then gptq"),
        Method(name="smoothquant", rounding="nearest", fold="smooth", idea="outliers moved from activations to weights, for w8a8; arXiv:2211.10438"),
        Method(name="gptaq", rounding="gptq", aims=True, idea="gptq that also makes good what earlier linears lost; after arXiv:2504.02692"),
        Method(name="smooth-search", rounding="gptq", fold="smooth-search", aims=True, idea="a scale per channel by descent, then gptaq; for w8a8"),
        Method(name="hadamard-smooth", rounding="gptq", fold="smooth-search", aims=True, rotate=True, idea="rotated, then smooth-search; for w8a8"),
        Method(name="hadamard", rounding="search", rotate=True, idea="rotated by a random Hadamard matrix, scales searched; no text; arXiv:2404.00456"),
        Method(name="hadamard-gptq", rounding="gptq", rotate=True, idea="rotated, then gptq"),
    )
}


def find_method(name: str) -> Method:
    """The method of this name, or InputError with the list."""
    if name not in METHODS:
        close = get_close_matches(name[:40], METHODS, n=2, cutoff=0.5)
        hint = f"Closest: {', '.join(close)}. " if close else ""
        raise InputError(f"unknown method '{name}'. {hint}Known: {', '.join(METHODS)}")
    return METHODS[name]


def is_dense(fmt: WeightFormat) -> bool:
    return fmt.name in DTYPES


def check_formats(spec: ModelSpec, plan: WeightPlan, method: Method) -> None:
    """Before anything is read: raises UnsupportedError or InputError where a format cannot hold a matrix of the model, or the method cannot fill it."""
    for index in range(spec.L):
        for tensor in layer_matrices(spec, index):
            fmt = plan.format_of(tensor)
            why = refusal(fmt, tensor.shape[-1])
            if why is not None:
                raise InputError(f"{tensor.name}: {why}")
            if method.rounding == "gptq" and not is_dense(fmt) and not takes_feedback(fmt):
                raise UnsupportedError(f"--method {method.name} fills integers, fp8, nf4 and e8, not {fmt.name}. Use --method rtn, or awq")
    if method.fold in ("smooth", "smooth-search") and "w8a8" not in plan.names:
        raise InputError(f"--method {method.name} prepares activations for int8: give it --format w8a8. For weights alone use awq or gptq")


def layer_matrices(spec: ModelSpec, index: int) -> list[TensorSpec]:
    """The matrices of a layer that a format may hold."""
    return [tensor for tensor in layer_tensors(spec, index) if tensor.role in ("qkv", "attn_out", "gate_up", "down") and tensor.name.endswith(".weight")]


@dataclass
class Inputs:
    """Statistics of a linear's inputs, and what roundings derive from them, once."""

    gram: Gram
    _gptq: Factor | None = None
    _lattice: tuple[Tensor, Factor] | None = None

    @property
    def gptq(self) -> Factor:
        if self._gptq is None:
            self._gptq = gptq_factor(self.gram.gram_CC)
        return self._gptq

    @property
    def lattice(self) -> tuple[Tensor, Factor]:
        if self._lattice is None:
            self._lattice = lattice_factor(self.gram.gram_CC)
        return self._lattice


def round_matrix(fmt: WeightFormat, weight_RC: Tensor, inputs: Inputs | None, rounding: Rounding) -> Codes:
    """Codes of one matrix, as the format holds them (nf4's scales doubly quantized), so that what is decoded from them is what will multiply."""
    if is_dense(fmt):
        return Codes(weight_RC.to(DTYPES[fmt.name]))
    if rounding == "gptq" and inputs is not None:
        codes = ldlq(fmt, weight_RC, *inputs.lattice) if fmt.name.startswith("e8") else gptq(fmt, weight_RC, inputs.gram.gram_CC, inputs.gptq)
    elif rounding == "clip" and inputs is not None and can_clip(fmt):
        codes = encode_affine(weight_RC, fmt, *clipped_grid(weight_RC, fmt, inputs.gram.gram_CC))
    else:
        codes = round_to_nearest(fmt.name, weight_RC, search=rounding != "nearest")
    if not fmt.nested:
        return codes
    held = build_weight(fmt.name, tuple(weight_RC.shape), dense=torch.float32)
    assert not isinstance(held, NativeWeight), "built as stored"
    held.set_rows(slice(0, len(weight_RC)), codes)
    return held.get_rows(0, len(weight_RC))


@dataclass
class QuantizedLayer:
    """`tensors`: the layer in fp32 as it will compute, folded and rounded. `codes`: (format, codes) of each matrix. `errors`: relative squared output error."""

    tensors: Tensors
    codes: dict[str, tuple[str, Codes]]
    errors: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def quantize_layer(
    spec: ModelSpec,
    index: int,
    tensors: Tensors,
    grams: Mapping[str, Gram],
    plan: WeightPlan,
    method: Method,
    *,
    alpha: float | None = None,
    round_norm: Callable[[Tensor], Tensor] = lambda x: x,
) -> QuantizedLayer:
    """One layer by one method. `tensors` (fp32, overwritten) and `grams` by stem ("attn.qkv", empty for methods without text); alpha is SmoothQuant's."""
    prefix, layer = f"layers.{index}.", spec.layers[index]
    formats = {tensor.name: plan.format_of(tensor) for tensor in layer_matrices(spec, index)}
    alphas = _fold(tensors, prefix, layer, grams, formats, method, alpha, round_norm)
    found = QuantizedLayer(dict(tensors), {}, alphas=alphas)
    for name, fmt in formats.items():
        stem = name.removeprefix(prefix).removesuffix(".weight")
        inputs = Inputs(grams[stem]) if stem in grams else None
        codes = round_matrix(fmt, tensors[name], inputs, method.rounding)
        values_RC = decode(fmt.name, codes)
        if inputs is not None:
            gram_CC = inputs.gram.gram_CC
            found.errors[stem] = output_error(values_RC - tensors[name], gram_CC) / max(1e-30, output_error(tensors[name], gram_CC))
        found.tensors[name], found.codes[name] = values_RC, (fmt.name, codes)
    return found


def _fold(
    tensors: Tensors,
    prefix: str,
    layer: LayerSpec,
    grams: Mapping[str, Gram],
    formats: Mapping[str, WeightFormat],
    method: Method,
    alpha: float | None,
    round_norm: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    if method.fold == "awq":

        def rounded(stem: str, weight_RC: Tensor) -> Tensor | None:
            fmt = formats[f"{prefix}{stem}.weight"]
            return None if is_dense(fmt) else plainly_rounded(fmt, weight_RC)

        return fold_awq(tensors, prefix, layer, grams, rounded, round_norm=round_norm)
    if method.fold == "smooth":
        assert alpha is not None, "SmoothQuant has one α for the model, chosen before the layers"
        fold_smooth(tensors, prefix, layer, grams, alpha, round_norm=round_norm)
    return {}


def plainly_rounded(fmt: WeightFormat, weight_RC: Tensor) -> Tensor:
    """The values that round to nearest leaves, fp32: what a search over scales compares."""
    if can_clip(fmt):
        return affine_values(fmt, weight_RC, *affine_grid(weight_RC, fmt))
    return decode(fmt.name, round_to_nearest(fmt.name, weight_RC))


def named(name: str, group_size: int | None) -> str:
    """A format's full name out of what the command line says: ("int4", 64) → "int4-g64". Raises InputError for a group size that there is not."""
    if group_size is None:
        return find_format(name).name
    if "-g" in name and find_format(name).group:
        raise InputError(f"--format {name} says its group already. Leave --group-size {group_size} away, or write --format {name.split('-g')[0]}")
    full = f"{name}-g{group_size}"
    try:
        return find_format(full).name
    except InputError as error:
        raise InputError(f"--format {name} has no --group-size {group_size}: int4, int3 and int2 come in groups of 32, 64 and 128") from error
