"""config.json → ModelSpec, one file per group of families, one table of names.

A family is a function from a `ConfigReader` to a `ModelSpec`; it reads every key that matters, and what nobody read is refused. Adding a family: write that
function, enter it in FAMILIES, and tests compare its parameter count with transformers' on random configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from tradespace.errors import InputError, UnsupportedError
from tradespace.spec.families import eyes, falcon, gemma, gpt, hybrid, latent, llama, local_global, moe, phi
from tradespace.spec.families.reader import ConfigReader, shown
from tradespace.spec.model import ModelSpec
from tradespace.spec.published import published_bytes

Family = Callable[[ConfigReader], ModelSpec]

RUNNABLE: dict[str, Family] = {
    "llama": llama.llama,
    "mistral": llama.mistral,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "smollm3": llama.smollm3,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3_text,
    "gemma3": gemma.gemma3,
    "phi3": phi.phi3,
    "falcon": falcon.falcon,
    "gpt_bigcode": gpt.gpt_bigcode,
    "gpt2": gpt.gpt2,
}
PLAN_ONLY: dict[str, Family] = {
    "opt": gpt.opt,
    "bloom": gpt.bloom,
    "mixtral": moe.mixtral,
    "qwen2_moe": moe.qwen_moe,
    "qwen3_moe": moe.qwen_moe,
    "gpt_oss": moe.gpt_oss,
    "llama4": moe.llama4,
    "minimax_m2": moe.minimax_m2,
    "glm4_moe": moe.glm4_moe,
    "deepseek_v2": latent.deepseek_v2,
    "deepseek_v3": latent.deepseek_v3,
    "deepseek_v32": latent.deepseek_v32,
    "kimi_k2": latent.deepseek_v3,
    "kimi_k25": latent.kimi_k25,
    "glm_moe_dsa": latent.glm_moe_dsa,
    "qwen3_next": hybrid.qwen3_next,
    "qwen3_5": hybrid.qwen3_5,
    "qwen3_5_moe": hybrid.qwen3_5,
    "qwen3_5_text": hybrid.qwen3_5_text,
    "qwen3_5_moe_text": hybrid.qwen3_5_text,
    "nemotron_h": hybrid.nemotron_h,
    "nemotron-nas": hybrid.nemotron_nas,
    "minimax": hybrid.minimax,
    "minimax_m1": hybrid.minimax,
    "qwen3_vl": eyes.qwen3_vl,
    "qwen3_vl_moe": eyes.qwen3_vl,
    "mimo": llama.mimo,
    "mimo_v2_flash": local_global.mimo_v2_flash,
    "gemma4": local_global.gemma4,
    "gemma4_text": local_global.gemma4_text,
}
FAMILIES: dict[str, Family] = RUNNABLE | PLAN_ONLY

# Known by name, and known to hold a mechanism that no spec prices: refused with that reason rather than guessed.
REFUSED: dict[str, str] = {
    "deepseek_v4": "its compressed attention and hyper-connections are not priced",
    "deepseek_ref": "it is DeepSeek-V4, whose compressed attention and hyper-connections are not priced",
    "kimi_k3": "its residual attention, latent experts under norms and full-rank gates are not priced",
    "kimi_linear": "its layers' decay and gates (KDA) have a mixer, but no reader of this config yet",
    "minimax_m3": "its block-sparse attention is not priced",
    "step3p7": "the config leaves out the heads of its sliding layers and the gates on their output",
    "step3p5": "the heads of its sliding layers and the gates on their output are not priced",
    "mamba": "models of recurrent layers alone are not priced",
    "mamba2": "models of recurrent layers alone are not priced",
    "t5": "encoder-decoder models are not language models of one stream",
    "bert": "an encoder does not generate",
}


def model_spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The ModelSpec of a Hugging Face config.json, read as a dictionary.

    Raises InputError where a field is missing, ill-typed or beyond sense, UnsupportedError where the family, or a field that could change results, is not
    understood; both name the field. The work done is bounded whatever the dictionary says.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{name}: config.json must hold a dictionary; it holds {type(config).__name__}")
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise InputError(f"{name}: config.json has no 'model_type'; it is {shown(family)}. Known: {', '.join(FAMILIES)}")
    if family in REFUSED:
        raise UnsupportedError(f"{name}: model_type '{family}' cannot be planned: {REFUSED[family]}")
    if family not in FAMILIES:
        close = get_close_matches(family[:64], FAMILIES, n=3, cutoff=0.5)
        hint = f"Closest known: {', '.join(close)}" if close else f"Known: {', '.join(FAMILIES)}"
        raise UnsupportedError(f"{name}: unknown model_type {shown(family)}. {hint}")
    reader = ConfigReader(config, name=name, family=family)
    reader.raw("model_type")
    model = FAMILIES[family](reader)
    return model if model.quantization is None else replace(model, published_bytes=published_bytes(config, model))
