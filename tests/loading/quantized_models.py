"""Tiny checkpoints whose matrices are drawn codes: no quantizer takes part, so what a test compares is the storage alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tradespace.formats import Codes, decode
from tradespace.kernels.view import StepBatch, positions_of
from tradespace.loading.quantized import load_quantized, stored_formats
from tradespace.loading.safetensors import SafetensorsFile, read_sharded
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.formats import find_format
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import QUANTIZABLE_ROLES
from tradespace.spec.weights import WeightPlan

STAGING_BYTES = 64 << 10  # so small that every matrix takes several chunks
V, D, F = 97, 256, 384
AFFINE = tuple(f"int{bits}-g{group}{zero}" for bits in (4, 3, 2) for group in (128, 64, 32) for zero in ("", "-zp"))


def tiny_config(family: str = "llama", *, tied: bool = False, width: int = D, hidden: int = F, heads: int = 4, kv_heads: int = 2, vocab: int = V):
    """Rows of q, k and v are multiples of 128, so that blocks of that size fit all three."""
    kinds = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    config = kinds[family](
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "eager"
    return config


def tiny_model(config: transformers.PreTrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.06)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def draw_codes(name: str, rows: int, columns: int, seed: int) -> Codes:
    """Codes and scales of a format, drawn so that values have a spread of about 0.06."""
    draw = torch.Generator().manual_seed(seed)
    fmt = find_format(name)
    groups = fmt.groups(columns)

    def scales(count: int, size: float) -> Tensor:
        return (torch.rand(rows, count, generator=draw) + 0.5) * size

    if name.startswith("int") and not name.startswith("int8"):
        top = 2 ** int(fmt.bits)
        codes = torch.randint(0, top, (rows, columns), generator=draw, dtype=torch.uint8)
        zero = torch.randint(0, top, (rows, groups), generator=draw, dtype=torch.uint8) if fmt.zero_bits else None
        return Codes(codes, scales(groups, 0.2 / top).half().float(), zero)
    if name.startswith(("int8", "w8a8")):
        codes = torch.randint(-127, 128, (rows, columns), generator=draw, dtype=torch.int8)
        return Codes(codes, scales(1, 0.0008)[: 1 if name.endswith("-tensor") else None].expand(rows, 1))
    if name.startswith("fp8"):
        codes = torch.randn(rows, columns, generator=draw).mul_(60).to(torch.float8_e4m3fn)
        scale = scales(groups, 0.001)
        shared = {"fp8": 1, "fp8-tensor": rows, "fp8-block": 128}[name]
        return Codes(codes, scale[::shared].repeat_interleave(shared, dim=0)[:rows])
    if name.startswith("nf4"):
        codes = torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8)
        if name == "nf4-plain":
            return Codes(codes, scales(groups, 0.1))
        nested = torch.randint(0, 256, (rows, groups), generator=draw, dtype=torch.uint8)
        each = torch.rand(-(-rows * groups // 256), generator=draw) * 0.05
        return Codes(codes, each.repeat_interleave(256)[: rows * groups].view(rows, groups), nested_RG=nested, offset=0.125 + seed / 1024)
    raise AssertionError(name)


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and the dense values that its matrices stand for."""

    folder: Path
    values: Mapping[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def spec(self) -> ModelSpec:
        return model_spec_from_config(self.config, "tiny")

    @property
    def source(self) -> SafetensorsFile:
        return read_sharded(self.folder)

    @property
    def plan(self) -> WeightPlan:
        return stored_formats(self.config, self.spec, self.source)

    def ours(self, plan: WeightPlan | None = None, staging_bytes: int = STAGING_BYTES) -> Transformer:
        """Built as `plan` says (as stored: None), activations in fp32."""
        model = build_fp32(self.spec, plan or self.plan)
        self.load(model, staging_bytes)
        return model

    def load(self, model: Transformer, staging_bytes: int = STAGING_BYTES) -> tuple[str, ...]:
        return load_quantized(model, self.source, self.spec, config=self.config, fill=fill_rtn, staging_bytes=staging_bytes)


def build_fp32(spec: ModelSpec, plan: WeightPlan, *, max_context: int = 64) -> Transformer:
    """Formats as planned, activations in fp32."""
    formats = dict.fromkeys((role for role in QUANTIZABLE_ROLES), plan.default) | dict(plan.exceptions)
    return Transformer(spec, WeightPlan(default="fp32", exceptions=formats), max_context=max_context)


def weight_of(model: Transformer, name: str) -> Any:
    """The format's module of this name (the type of a submodule says nothing of its `fmt`)."""
    return model.get_submodule(name)


def logits(model: Transformer, tokens_T: Tensor) -> Tensor:
    batch = StepBatch.packed([len(tokens_T)])
    with torch.inference_mode():
        return model.logits(model(tokens_T, positions_of(batch.spans), batch))


def save(folder: Path, config: transformers.PreTrainedConfig, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = config.to_dict() | {"architectures": [type(config).__name__.replace("Config", "ForCausalLM")]}
    if quantization is not None:
        values["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def linear_modules(model: transformers.PreTrainedModel, *, head: bool = False) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and (head or name != "lm_head")}


Store = Callable[[str, Codes, tuple[int, int]], Mapping[str, Tensor]]


def write_checkpoint(
    folder: Path,
    config: transformers.PreTrainedConfig,
    format_of: Callable[[str], str | None],
    store: Store,
    quantization: Mapping[str, Any],
    *,
    head: bool = False,
    draw: Callable[[str, int, int, int], Codes] = draw_codes,
) -> Checkpoint:
    """A random model whose linears (those that have a format) are drawn codes, stored by `store`."""
    model = tiny_model(config)
    tensors, values = dict(model.state_dict()), {}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    for seed, (name, module) in enumerate(linear_modules(model, head=head).items()):
        fmt = format_of(name)
        if fmt is None:
            continue
        shape = (module.out_features, module.in_features)
        codes = draw(fmt, *shape, seed)
        values[name] = decode(fmt, codes)
        del tensors[f"{name}.weight"]
        tensors |= store(name, codes, shape)
    save(folder, config, tensors, quantization)
    return Checkpoint(folder, values)


@torch.no_grad()
def dense_logits(found: Checkpoint, tokens_T: Tensor) -> Tensor:
    """Of transformers' model with all tensors that are stored as floats, and `found.values` in the places of the codes."""
    config = transformers.AutoConfig.from_pretrained(found.folder)
    del config.quantization_config
    config._attn_implementation = "eager"
    model = tiny_model(config)
    stored = load_file(found.folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        parameter.copy_(found.values[module] if module in found.values else stored["model.embed_tokens.weight" if name not in stored else name])
    return model(tokens_T[None]).logits[0]
