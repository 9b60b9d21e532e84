"""Adapters as PEFT lays them down: adapter_config.json and adapter_model.safetensors, written and read. Names are those of the published linears."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tradespace.adapt.lora import LoraWeight, Shape, adapter_parameters, check_adapter, lora
from tradespace.errors import InputError, UnsupportedError
from tradespace.loading.names import hugging_face_pieces
from tradespace.loading.resolve import read_json_object
from tradespace.loading.safetensors import read_safetensors_header
from tradespace.model.transformer import Transformer
from tradespace.quantize.shards import write_shard
from tradespace.quantize.source import halves_order
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.spec.training import ADAPTED_ROLES, AdapterSpec, adapters

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# settings that change what an adapter computes, and the value under which it is ours
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "lora_bias": False}


def published_names(spec: ModelSpec) -> dict[tuple[str, int], str]:
    """(our fused matrix, part) → the published linear, such as "model.layers.0.self_attn.q_proj"."""
    found: dict[tuple[str, int], str] = {}
    counts: dict[str, int] = {}
    for piece in hugging_face_pieces(spec, ()):
        if piece.target.endswith(".weight") and not piece.is_vector:
            tensor = piece.target.removesuffix(".weight")
            if piece.order != "stacked" or piece.transposed:
                raise UnsupportedError(f"{spec.name}: adapters in PEFT's format are written for families that store q, k and v apart, not for {spec.family}")
            found[tensor, counts.get(tensor, 0)] = piece.source.removesuffix(".weight")
            counts[tensor] = counts.get(tensor, 0) + 1
    return found


def save_adapter(model: Transformer, folder: Path, shape: Shape, *, base: str, name: str = "default") -> None:
    """Writes an adapter of `model` (whose rotary pairs are halves) into `folder`."""
    names = published_names(model.spec)
    tensors: dict[str, Tensor] = {}
    for key, value in adapter_parameters(model, name).items():
        tensor, kind, part = re.fullmatch(r"(.*)\.(lora_[AB])\.(\d+)", key).groups()  # pyright: ignore[reportOptionalMemberAccess]
        tensors[f"{PREFIX}{names[tensor, int(part)]}.{kind}.weight"] = value.detach().cpu().contiguous()
    modules = sorted({names[adapter.tensor, adapter.part].rsplit(".", 1)[1] for adapter in adapters(model.spec, shape.targets)})
    alpha: Any = int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": shape.rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        "target_modules": modules, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def held_bytes(folder: Path) -> int:
    """What an adapter takes once it is loaded: 4 bytes a number. Raises InputError for a folder without one."""
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} holds no {WEIGHTS}. Give a folder that `tradespace finetune` or PEFT wrote")
    return sum(4 * prod(tensor.shape) for tensor in read_safetensors_header(folder / WEIGHTS).tensors.values())


def load_adapter(model: Transformer, folder: Path, *, name: str, learn: bool = False) -> Shape:
    """Puts PEFT's adapter in `folder` beside the linears of `model`. Raises InputError for another model's, UnsupportedError for what we do not compute."""
    config = read_json_object(folder / CONFIG)
    if config is None:
        raise InputError(f"{folder} holds no {CONFIG}. Give a folder that `tradespace finetune` or PEFT wrote")
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{folder}: adapters of type {config.get('peft_type')} are not read; LoRA is")
    for key, plain in PLAIN.items():
        if config.get(key, plain) not in (plain, None) and config.get(key):
            raise UnsupportedError(f"{folder}: {key} = {config[key]} changes what the adapter computes, and is not supported")
    rank = int(config["r"])
    alpha = float(config["lora_alpha"]) * (rank**0.5 if config.get("use_rslora") else 1.0)
    read_safetensors_header(folder / WEIGHTS)  # refuses what is no such file, by our own reader
    source = load_file(folder / WEIGHTS)
    names = {published: place for place, published in published_names(model.spec).items()}
    specs = {(adapter.tensor, adapter.part): adapter for adapter in adapters(model.spec, ADAPTED_ROLES)}
    found: dict[str, Tensor] = {}
    chosen: dict[tuple[str, int], AdapterSpec] = {}
    for stored, value in source.items():
        matched = re.fullmatch(r"(?:base_model\.model\.)?(.*)\.(lora_[AB])(?:\.default)?\.weight", stored)
        place = names.get(matched[1]) if matched else None
        if matched is None or place is None or place not in specs:
            raise InputError(f"{folder}: {stored} stands beside no linear of {model.spec.name} that takes an adapter")
        found[f"{place[0]}.{matched[2]}.{place[1]}"] = value.float()
        chosen[place] = specs[place]
    wanted = {f"{a.tensor}.lora_A.{a.part}": (rank, a.columns) for a in chosen.values()} | {
        f"{a.tensor}.lora_B.{a.part}": (a.rows, rank) for a in chosen.values()
    }
    check_adapter(model.spec, {key: tuple(value.shape) for key, value in found.items()}, wanted, str(folder))
    if missing := wanted.keys() - found.keys():
        raise InputError(f"{folder}: {min(missing)} is missing")
    roles = {tensor.name.removesuffix(".weight"): tensor.role for tensor in model_tensors(model.spec)}
    shape = Shape(rank=rank, alpha=alpha, targets=tuple(role for role in ADAPTED_ROLES if any(roles[tensor] == role for tensor, _ in chosen)))
    ordered = [adapter for adapter in adapters(model.spec, ADAPTED_ROLES) if (adapter.tensor, adapter.part) in chosen]
    lora(model, shape, name=name, learn=learn, specs=ordered)
    for key, parameter in adapter_parameters(model, name).items():
        parameter.data.copy_(_as_held(model.spec, key, found[key]))
    return shape


def _as_held(spec: ModelSpec, key: str, value: Tensor) -> Tensor:
    """Rows of B for queries and keys in the order in which the model holds its heads' pairs."""
    tensor, part = key.split(".lora_")[0], int(key.rsplit(".", 1)[1])
    if not tensor.endswith(".attn.qkv") or ".lora_B." not in key or part > 1:
        return value
    mixer = spec.layers[int(tensor.split(".")[1])].mixer
    assert isinstance(mixer, Attention), "qkv belongs to attention"
    order = halves_order(mixer)
    if order is None:
        return value
    start = 0 if part == 0 else mixer.N * mixer.H
    found = torch.empty_like(value)
    found[order[start : start + len(value)] - start] = value  # a head's rows stay within their part
    return found


__all__ = ["LoraWeight", "Shape", "load_adapter", "published_names", "save_adapter"]
