"""Llama and its close kin, which differ in biases, head norms, windows and where positions rotate: Llama 1 to 3.3, Mistral, Qwen 2 and 3, SmolLM3.

Papers: arXiv:2302.13971 (Llama), arXiv:2407.21783 (Llama 3), arXiv:2310.06825 (Mistral), arXiv:2412.15115 (Qwen2.5), arXiv:2505.09388 (Qwen3).
"""

from __future__ import annotations

from dataclasses import replace

from tradespace.spec.families.parts import Sizes, activation, layer_windows, quantization, read_rope, read_sizes, sliding_window, stored_dtype
from tradespace.spec.families.reader import ConfigReader
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec


def dense_ffn(config: ConfigReader, *, bias: bool = False) -> DenseFFN:
    """The gated feed-forward of this whole branch."""
    return DenseFFN(F=config.integer("intermediate_size"), activation=activation(config, "hidden_act", default="silu"), bias=bias)


def rms_model(config: ConfigReader, sizes: Sizes, layers: list[LayerSpec], *, eps: float = 1e-6, tied: bool = False) -> ModelSpec:
    """The frame around the layers: RMS norms, one embedding, one head. `eps` and `tied` are the family's defaults where the config is silent."""
    return ModelSpec(
        name=config.name,
        family=config.family,
        D=sizes.D,
        V=sizes.V,
        layers=tuple(layers),
        max_context=sizes.context,
        norm_eps=config.number("rms_norm_eps", "layernorm_epsilon", default=eps, high=1.0),
        tied=config.flag("tie_word_embeddings", default=tied),
        stored_dtype=stored_dtype(config),
        quantization=quantization(config),
    )


def llama(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=2048)
    rope = read_rope(config, sizes.H, sizes.context)
    bias = config.flag("attention_bias", default=False)
    mixer = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(mixer=mixer, ffn=dense_ffn(config, bias=config.flag("mlp_bias", default=False)))
    model = rms_model(config, sizes, [layer] * sizes.L)
    config.finish(harmless=("max_sequence_length",))
    return model


def mistral(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=131_072, kv_heads=8)
    # a config that is silent gets the class's window of 4096; null, which is how v0.2 and later are published, is no window
    window = sliding_window(config) if "sliding_window" in config.values else 4096
    mixer = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=read_rope(config, sizes.H, sizes.context), window=window)
    layer = LayerSpec(mixer=mixer, ffn=dense_ffn(config))
    model = rms_model(config, sizes, [layer] * sizes.L)
    config.finish()
    return model


def _qwen(config: ConfigReader, *, qkv_bias: bool, out_bias: bool, head_norm: bool, head_size: int | None) -> ModelSpec:
    sizes = read_sizes(config, context=32_768, kv_heads=32, head_size=head_size)
    windowed = config.flag("use_sliding_window", default=False)
    window = sliding_window(config)
    if "sliding_window" not in config.values:
        window = 4096
    first = config.integer("max_window_layers", default=28, low=0)
    use_window = window is not None and windowed
    windows = layer_windows(config, sizes.L, window if windowed else None, lambda i: use_window and i >= first)
    rope, ffn = read_rope(config, sizes.H, sizes.context), dense_ffn(config)
    config.require("use_mrope", False)
    layers = [
        LayerSpec(
            mixer=Attention(
                N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, window=w, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm="head" if head_norm else "none"
            ),
            ffn=ffn,
        )
        for w in windows
    ]
    return rms_model(config, sizes, layers)


def qwen2(config: ConfigReader) -> ModelSpec:
    model = _qwen(config, qkv_bias=True, out_bias=False, head_norm=False, head_size=None)
    config.finish()
    return model


def qwen3(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", default=False)
    model = _qwen(config, qkv_bias=bias, out_bias=bias, head_norm=True, head_size=128)
    config.finish()
    return model


def smollm3(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=32_768, kv_heads=4)
    rotates = config.per_layer("no_rope_layers", sizes.L, int)  # 1: this layer rotates, despite the name
    interval = config.integer("no_rope_layer_interval", default=4)
    if rotates is None:
        rotates = [(i + 1) % interval != 0 for i in range(sizes.L)]
    if any(flag not in (0, 1) for flag in rotates):
        raise config.wrong("no_rope_layers", "must hold zeros and ones")
    window = sliding_window(config)
    windowed = config.flag("use_sliding_window", default=False)
    windows = layer_windows(config, sizes.L, window if windowed else None, lambda i: windowed and window is not None and not rotates[i])
    rope = read_rope(config, sizes.H, sizes.context, theta=2_000_000.0)
    bias, ffn = config.flag("attention_bias", default=False), dense_ffn(config, bias=config.flag("mlp_bias", default=False))
    layers = [
        LayerSpec(mixer=Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope if turn else None, window=w, qkv_bias=bias, out_bias=bias), ffn=ffn)
        for turn, w in zip(rotates, windows, strict=True)
    ]
    model = rms_model(config, sizes, layers, tied=True)
    config.finish(harmless=("max_window_layers",))
    return model


def mimo(config: ConfigReader) -> ModelSpec:
    """MiMo-7B: Qwen2's mathematics, trained with a module that predicts one token more."""
    model = _qwen(config, qkv_bias=config.flag("attention_bias", default=True), out_bias=False, head_norm=False, head_size=None)
    ahead = config.integer("num_nextn_predict_layers", default=0, low=0, high=64)
    config.finish()
    left_out = (f"{ahead} multi-token prediction layer{'s' if ahead > 1 else ''}",) if ahead else ()
    return replace(model, plan_only="MiMo's loader is not written yet", left_out=left_out)
