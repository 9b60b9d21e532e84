"""The bytes of a checkpoint as its `quantization_config` describes it: the decoder's matrices in the format that it names, what it leaves out in 16 bits.

Which matrices are coded is read from the config's own list of modules (three dialects: names and parts of names, shell patterns, `re:` expressions), under the
names that the family's published modules have. Embeddings, routers, norms and biases are never coded. What is not understood gives None, never a guess.
Formats: fp8 in blocks (arXiv:2412.19437), NVFP4 (4 bits, e4m3 scale per 16, two numbers a matrix), MXFP4 (4 bits, 8-bit exponent per 32; OCP MX 1.0),
compressed-tensors' packed integers (a 16-bit scale per group, the shape beside it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from math import prod
from typing import Any

from tradespace.spec.formats import ELEMENT_BYTES, WeightFormat
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import TensorSpec, layer_tensors, model_tensors

_NEVER = ("embed", "norm", "bias", "router", "sinks", "positions")
# module names under "layers.N.", by our tensor's name without "layers.N." and ".weight"; {experts} and {shared} differ by family
_MODULES = {
    "attn.qkv": "self_attn.q_proj",
    "attn.gate": "self_attn.q_proj",
    "attn.out": "self_attn.o_proj",
    "attn.q_down": "self_attn.q_a_proj",
    "attn.q_up": "self_attn.q_b_proj",
    "attn.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_up": "self_attn.kv_b_proj",
    "attn.index.q": "self_attn.indexer.wq_b",
    "attn.index.k": "self_attn.indexer.wk",
    "delta.qkv": "linear_attn.in_proj_qkv",
    "delta.gate": "linear_attn.in_proj_z",
    "delta.out": "linear_attn.out_proj",
    "ffn.gate_up": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.experts.gate_up": "{experts}.gate_proj",
    "ffn.experts.up": "{experts}.up_proj",
    "ffn.experts.down": "{experts}.down_proj",
    "ffn.shared.gate_up": "{shared}.gate_proj",
    "ffn.shared.up": "{shared}.up_proj",
    "ffn.shared.down": "{shared}.down_proj",
}
_EXPERTS = {"minimax_m2": "block_sparse_moe.experts.0", "gemma4": "experts.0", "gemma4_text": "experts.0"}
_SHARED = {"gemma4": "mlp", "gemma4_text": "mlp"} | dict.fromkeys(("qwen2_moe", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"), "mlp.shared_expert")
# .* and alternation cover what exporters write; nested repetition would let a pattern in a config run for ever
_PLAIN = re.compile(r"(?:[\w\s.\-:,/]|\\[.dw\-]|\.\*|\.\+|\\d\+|\\d\*|\[[\w\-^]+\][+*]?|\(\?:|[()|^$])*")
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")  # as published; under eyes in two ways


@dataclass(frozen=True, slots=True)
class Scheme:
    """One coded format, what each matrix carries besides, and which modules it takes, by all the names that they may have."""

    held: WeightFormat
    matrix_bytes: int
    takes: Callable[[tuple[str, ...]], bool]


def published_bytes(config: Mapping[str, Any], model: ModelSpec) -> int | None:
    """Bytes of `model`'s decoder (no towers, no multi-token prediction) as `config` says that it is published; None: it names no format, or an unknown one."""
    settings = _settings(config)
    schemes = None if settings is None else _schemes(settings, model)
    if schemes is None:
        return None
    outside = [tensor for tensor in model_tensors(model) if tensor.layer < 0]
    inside = (tensor for index in range(model.L) for tensor in layer_tensors(model, index))
    return sum(_nbytes(tensor, model, schemes) for tensor in (*outside, *inside))


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    for where in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(where.get(key), Mapping):
                return where[key]
    return None


def _nbytes(tensor: TensorSpec, model: ModelSpec, schemes: Iterable[Scheme]) -> int:
    plain = prod(tensor.shape) * ELEMENT_BYTES.get(model.stored_dtype, 2)
    if tensor.role in _NEVER or len(tensor.shape) < 2:
        return plain
    names = module_names(tensor, model)
    for scheme in schemes:
        if names and scheme.takes(names):
            matrices = prod(tensor.shape[:-2]) * (3 if tensor.name.endswith("attn.qkv.weight") else 2 if "gate_up" in tensor.name else 1)
            return scheme.held.nbytes(tensor.shape) + matrices * scheme.matrix_bytes
    return plain


def module_names(tensor: TensorSpec, model: ModelSpec) -> tuple[str, ...]:
    """The names under which published checkpoints have this matrix (of fused ones the first part); none: nobody codes it."""
    if tensor.layer < 0:
        return ("lm_head", "language_model.lm_head") if tensor.role == "lm_head" else ()
    within = tensor.name.split(".", 2)[2].removesuffix(".weight")
    if within not in _MODULES:
        return ()
    parts = {"experts": _EXPERTS.get(model.family, "mlp.experts.0"), "shared": _SHARED.get(model.family, "mlp.shared_experts")}
    return tuple(f"{prefix}layers.{tensor.layer}.{_MODULES[within].format(**parts)}" for prefix in _PREFIXES)


def _matcher(entries: Iterable[str]) -> Callable[[tuple[str, ...]], bool] | None:
    """Whether one of a config's entries names a module under one of its names: in full, as a pattern, by a part between dots, or by what it lies in.

    None: one is an expression that is not understood, or whose search could take for ever.
    """
    found = []
    for entry in entries:
        if entry.startswith("re:"):
            expression = plain_expression(entry[3:])
            if expression is None:
                return None
            found.append(expression)
        elif "*" in entry:
            found.append(re.compile(f"{translate(entry)}|{translate(entry.rstrip('*').rstrip('.') + '.*')}"))
        else:
            found.append(re.compile(rf"(.*\.)?{re.escape(entry)}(\..*)?$"))
    return lambda names: any(pattern.match(name) for pattern in found for name in names)


def plain_expression(body: str) -> re.Pattern[str] | None:
    """A config's regular expression, compiled, if it is one of names, .*, \\d+, [sets] and (alter|natives) that no search can take for ever with; else None."""
    if not _PLAIN.fullmatch(body) or re.search(r"\)[*+?{]", body):
        return None
    try:
        return re.compile(body)
    except re.error:
        return None


def _left_out(settings: Mapping[str, Any]) -> list[str] | None:
    """The modules that stay as they are, under any of the three keys; None: the list is none."""
    found: list[str] = []
    for key in ("modules_to_not_convert", "ignore", "exclude_modules"):
        entries = settings.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            return None
        found += entries
    return found


def _schemes(settings: Mapping[str, Any], model: ModelSpec) -> tuple[Scheme, ...] | None:
    method, left_out = settings.get("quant_method"), _left_out(settings)
    kept = None if left_out is None else _matcher(left_out)
    if kept is None:
        return None
    block = settings.get("weight_block_size")
    if method == "fp8" and isinstance(block, list) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block):
        held = WeightFormat(name="fp8 in blocks", bits=8, group=block[1], scale_rows=block[0], scale_bytes=4)
        return (Scheme(held, 0, lambda names: "lm_head" not in names and not kept(names)),)  # the head is never converted by this method
    if method == "mxfp4":
        held = WeightFormat(name="mxfp4", bits=4, group=32, scale_bytes=1)
        return (Scheme(held, 0, lambda names: ".experts." in names[0] and not kept(names)),)  # the one module that it converts
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return None
    found = [_grouped(group, kept, bool(settings.get("quant_algo"))) for group in groups.values()]
    return None if None in found else tuple(scheme for scheme in found if scheme is not None)


def _grouped(group: Any, kept: Callable[[tuple[str, ...]], bool], modelopt: bool) -> Scheme | None:
    """One of `config_groups`, as NVIDIA's ModelOpt and compressed-tensors write them."""
    weights, targets = (group.get("weights"), group.get("targets", ["Linear"])) if isinstance(group, Mapping) else (None, None)
    if not isinstance(weights, Mapping) or not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return None
    bits, size, kind = weights.get("num_bits"), weights.get("group_size"), weights.get("type")
    if modelopt and (bits, size, kind) == (4, 16, "float"):
        held, beside = WeightFormat(name="nvfp4", bits=4, group=16, scale_bytes=1), 4 + 4  # the matrix's scale and its input's
    elif modelopt and (bits, size, kind) == (8, None, "float"):
        held, beside = WeightFormat(name="fp8", bits=8), 4 + 4
    elif not modelopt and kind == "int" and bits in (2, 4, 8) and isinstance(size, int) and size > 0 and weights.get("symmetric") is True:
        held, beside = WeightFormat(name="packed", bits=bits, group=size, scale_bytes=2), 2 * 8  # rows and columns
    else:
        return None
    asked = (lambda names: True) if "Linear" in targets else _matcher(targets)
    return None if asked is None else Scheme(held, beside, lambda names: asked(names) and not kept(names))
