"""Text decoders under a vision tower that is itself left out: Qwen3-VL, dense and routed. Their three position axes coincide for text."""

from __future__ import annotations

from dataclasses import replace

from tradespace.spec.families import llama, moe
from tradespace.spec.families.parts import under_eyes
from tradespace.spec.families.reader import ConfigReader
from tradespace.spec.model import ModelSpec

_AXES = ("mrope_interleaved", "mrope_section")


def qwen3_vl(config: ConfigReader) -> ModelSpec:
    values = config.nested("text_config", harmless=config.values.get("text_config") or ()).values  # its own reader finishes it
    routed = config.family.endswith("moe")
    plain = dict(values)
    plain.pop("model_type", None)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(plain.get(key), dict):  # how the axes share the dimensions says nothing for text
            plain[key] = {name: value for name, value in plain[key].items() if name not in _AXES}
    text = ConfigReader(plain, name=config.name, family="qwen3_moe" if routed else "qwen3", path="text_config.")
    model = moe.qwen_moe(text) if routed else llama.qwen3(text)
    reason = model.plan_only or "the loader does not look for a decoder under a vision tower yet"
    return under_eyes(config, replace(model, plan_only=reason))
