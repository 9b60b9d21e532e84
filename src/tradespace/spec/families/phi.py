"""Phi-3 (arXiv:2404.14219): Llama's mathematics with q, k, v and gate, up stored fused, a sliding window, and two sets of rotary factors for two lengths."""

from __future__ import annotations

from tradespace.spec.families.llama import dense_ffn, rms_model
from tradespace.spec.families.parts import read_rope, read_sizes, sliding_window
from tradespace.spec.families.reader import ConfigReader
from tradespace.spec.mixers import Attention
from tradespace.spec.model import LayerSpec, ModelSpec


def phi3(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=4096)
    if config.values.get("original_max_position_embeddings") is None and (config.values.get("rope_scaling") or config.values.get("rope_parameters")):
        # the class's own field, which wins over the dictionary's: Phi-3 was trained at 4096
        config = ConfigReader({**config.values, "original_max_position_embeddings": 4096}, name=config.name, family=config.family)
        sizes = read_sizes(config, context=4096)
    rope = read_rope(config, sizes.H, sizes.context)
    if rope.scaling is not None and rope.scaling.kind != "longrope":
        raise config.unsupported("rope_scaling", rope.scaling.kind, "is not a rotary scaling that Phi-3 has (longrope)")
    mixer = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, window=sliding_window(config))
    config.require("attention_bias", False)
    model = rms_model(config, sizes, [LayerSpec(mixer=mixer, ffn=dense_ffn(config))] * sizes.L, eps=1e-5)
    config.finish()
    return model
