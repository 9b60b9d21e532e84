"""ModelSpec → config.json and tokenizer files as Hugging Face's tools read them, for models that come from a GGUF file.

Whatever is written is read back by `spec.families` and must give the same model; a model for which it does not is refused, not approximated.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tradespace.errors import UnsupportedError
from tradespace.loading.gguf import GGUFFile
from tradespace.loading.gguf_tokenizer import tokenizer_from_gguf
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, ModelSpec

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def config_from_spec(spec: ModelSpec, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of `spec`, whose rotary pairs are halves. Raises UnsupportedError where no config says what the spec says."""
    family = spec.family
    first, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    if family not in _CLASSES or not isinstance(first, Attention) or not isinstance(ffn, DenseFFN):
        raise UnsupportedError(f"{spec.name}: no config.json is written for family {family}. Written: {', '.join(_CLASSES)}. Use --to gguf")
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "hidden_size": spec.D,
        "intermediate_size": ffn.F,
        "num_hidden_layers": spec.L,
        "num_attention_heads": first.N,
        "num_key_value_heads": first.K,
        "head_dim": first.H,
        "vocab_size": spec.V,
        "max_position_embeddings": spec.max_context,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "attention_bias": first.qkv_bias,
        "torch_dtype": dtype,
    }
    if family.startswith("gemma"):
        config |= _gemma(spec, first)
        config["hidden_activation"] = _ACTIVATIONS[ffn.activation]
    else:
        config |= {"hidden_act": _ACTIVATIONS[ffn.activation], "rope_theta": next(r.theta for r in _ropes(spec))}
    if family == "qwen2":
        del config["attention_bias"], config["head_dim"]
    if family == "llama":
        config["mlp_bias"] = ffn.bias
    if family == "smollm3":
        config["no_rope_layers"] = [int(isinstance(layer.mixer, Attention) and layer.mixer.rope is not None) for layer in spec.layers]
    _check(spec, config)
    return config


def _ropes(spec: ModelSpec) -> list[Any]:
    return [layer.mixer.rope for layer in spec.layers if isinstance(layer.mixer, Attention) and layer.mixer.rope is not None]


def _gemma(spec: ModelSpec, first: Attention) -> dict[str, Any]:
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]
    far = next((mixer for mixer in mixers if mixer.window is None), first)
    near = next((mixer for mixer in mixers if mixer.window is not None), first)
    found: dict[str, Any] = {
        "layer_types": ["full_attention" if mixer.window is None else "sliding_attention" for mixer in mixers],
        "sliding_window": near.window,
        "query_pre_attn_scalar": round(first.softmax_scale**-2),
        "attn_logit_softcapping": first.logit_softcap,
        "final_logit_softcapping": spec.logit_softcap,
        "rope_theta": far.rope.theta if far.rope is not None else 10_000.0,
    }
    if spec.family == "gemma3_text" and near.rope is not None:
        found["rope_local_base_freq"] = near.rope.theta
    return found


def comparable(spec: ModelSpec) -> ModelSpec:
    """The spec without what a config states and a GGUF file does not, or says in another way, though both compute the same."""

    def layer_of(mixer: Attention) -> Attention:
        return replace(mixer, scale=round(mixer.softmax_scale, 12))

    layers = tuple(replace(layer, mixer=layer_of(layer.mixer)) if isinstance(layer.mixer, Attention) else layer for layer in spec.layers)
    return replace(spec, name="", layers=layers, norm_plus_one=False, stored_dtype="bf16", quantization=None, extra_parameters=(), left_out=())


def _check(spec: ModelSpec, config: dict[str, Any]) -> None:
    again = comparable(model_spec_from_config(config, spec.name))
    wanted = comparable(spec)
    if again == wanted:
        return
    differs = [name for name in vars(wanted) if getattr(again, name) != getattr(wanted, name)] if hasattr(wanted, "__dict__") else []
    raise UnsupportedError(
        f"{spec.name}: a config.json of family {spec.family} cannot say what its GGUF file says ({', '.join(differs) or 'layers'}). Use --to gguf"
    )


def write_tokenizer(file: GGUFFile, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json out of a GGUF file's metadata."""
    found = tokenizer_from_gguf(file.metadata, str(file.path))
    (folder / "tokenizer.json").write_text(found.tokenizer.to_str(pretty=False), encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **found.special_tokens}
    if found.chat_template is not None:
        settings["chat_template"] = found.chat_template
    if found.tool_template is not None:
        templates = {"default": found.chat_template, "tool_use": found.tool_template}
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items() if text is not None]
    write_json(folder / "tokenizer_config.json", settings)
    generation: dict[str, Any] = {"eos_token_id": sorted(found.eos_ids)}
    if found.bos_id is not None:
        generation["bos_token_id"] = found.bos_id
    write_json(folder / "generation_config.json", generation)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, the same bytes for the same value."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
