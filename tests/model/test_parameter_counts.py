"""Parameters, layer by layer the same as transformers', on random tiny configs of every family that it knows too: built on the meta device, nothing is stored.

Where they differ on purpose: transformers keeps the correction of a router's scores as a buffer, we count it, for checkpoints hold it.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.spec.families import FAMILIES, model_spec_from_config
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors, num_parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

FLAG, EVEN = st.booleans(), st.sampled_from([4, 8, 12])


def _heads(draw: Any) -> tuple[int, int, int]:
    K = draw(st.integers(1, 3))
    return K * draw(st.integers(1, 3)), K, draw(EVEN)


@st.composite
def llama_like(draw: Any, family: str) -> dict[str, Any]:
    """Sizes of the Llama branch; the head size stands apart from width over heads where the family allows it."""
    N, K, H = _heads(draw)
    split = family in ("smollm3", "phi3", "qwen2", "qwen2_moe")  # these derive the head size
    config = {
        "model_type": family,
        "hidden_size": N * H if split else N * 2 * draw(st.integers(1, 6)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 7)),
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "vocab_size": draw(st.integers(2, 40)),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(FLAG),
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if not split:
        config["head_dim"] = H
    if family in ("llama", "smollm3"):
        config |= {"attention_bias": draw(FLAG), "mlp_bias": draw(FLAG)}
    if family in ("qwen3", "gemma2", "gemma3_text"):
        config["attention_bias"] = draw(FLAG)
    if family in ("mistral", "phi3", "gemma2", "gemma3_text"):
        config["sliding_window"] = draw(st.integers(1, 64))
    if family in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": draw(FLAG), "sliding_window": 16, "max_window_layers": draw(st.integers(0, 7))}
    if family == "smollm3":
        config |= {"no_rope_layer_interval": draw(st.integers(1, 4)), "use_sliding_window": draw(FLAG), "sliding_window": 16}
    if family == "gemma3_text" and draw(FLAG):
        config["sliding_window_pattern"] = draw(st.integers(1, 4))
    return config


@st.composite
def falcon(draw: Any) -> dict[str, Any]:
    newer, N = draw(FLAG), draw(st.sampled_from([2, 4, 6]))
    config = {"model_type": "falcon", "hidden_size": N * draw(EVEN), "num_hidden_layers": draw(st.integers(1, 3)), "num_attention_heads": N, "vocab_size": 17}
    config |= {"new_decoder_architecture": newer, "multi_query": draw(FLAG), "bias": draw(FLAG), "tie_word_embeddings": draw(FLAG), "bos_token_id": 0}
    config |= {"num_kv_heads": draw(st.sampled_from([1, 2, N])), "parallel_attn": newer or draw(FLAG), "eos_token_id": 1, "max_position_embeddings": 64}
    return config | ({"num_ln_in_parallel_attn": draw(st.sampled_from([1, 2]))} if newer and draw(FLAG) else {})


@st.composite
def gpt(draw: Any, family: str) -> dict[str, Any]:
    N = draw(st.integers(1, 4))
    config = {"model_type": family, "n_embd": N * draw(EVEN), "n_layer": draw(st.integers(1, 3)), "n_head": N, "n_positions": 32, "vocab_size": 19}
    config |= {"tie_word_embeddings": draw(FLAG), "bos_token_id": 0, "eos_token_id": 1}
    if draw(FLAG):
        config["n_inner"] = draw(st.integers(1, 40))
    return config | ({"multi_query": draw(FLAG)} if family == "gpt_bigcode" else {})


@st.composite
def opt(draw: Any) -> dict[str, Any]:
    N = draw(st.integers(1, 4))
    D = N * draw(EVEN)
    config = {"model_type": "opt", "hidden_size": D, "num_hidden_layers": draw(st.integers(1, 3)), "num_attention_heads": N, "vocab_size": 21}
    return config | {"ffn_dim": draw(st.integers(1, 40)), "max_position_embeddings": 32, "enable_bias": draw(FLAG), "word_embed_proj_dim": D}


@st.composite
def bloom(draw: Any) -> dict[str, Any]:
    N = draw(st.integers(1, 4))
    return {"model_type": "bloom", "hidden_size": N * draw(EVEN), "n_layer": draw(st.integers(1, 3)), "n_head": N, "vocab_size": 23}


@st.composite
def routed(draw: Any, family: str) -> dict[str, Any]:
    """Mixtures over softmax attention: the Llama branch's sizes, experts besides."""
    config = draw(llama_like(family))
    E = draw(st.integers(2, 5))
    config |= {"num_experts_per_tok": draw(st.integers(1, E))}
    config["num_experts" if family.startswith("qwen") else "num_local_experts"] = E
    if family.startswith("qwen"):
        config |= {
            "moe_intermediate_size": draw(st.integers(1, 9)),
            "decoder_sparse_step": draw(st.integers(1, 2)),
            "mlp_only_layers": draw(st.sampled_from([[], [0]])),
        }
    if family == "qwen2_moe":
        config["shared_expert_intermediate_size"] = draw(st.integers(1, 9))
    return config


@st.composite
def latent(draw: Any, family: str) -> dict[str, Any]:
    N = draw(st.integers(1, 3))
    config = {"model_type": family, "hidden_size": N * 8, "num_hidden_layers": draw(st.integers(1, 4)), "num_attention_heads": N, "num_key_value_heads": N}
    config |= {"vocab_size": 29, "intermediate_size": draw(st.integers(1, 9)), "moe_intermediate_size": draw(st.integers(1, 9)), "n_routed_experts": 4}
    config |= {
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_experts_per_tok": 2,
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "n_group": 1,
        "topk_group": 1,
    }
    config |= {"q_lora_rank": draw(st.sampled_from([3, 6])), "kv_lora_rank": draw(st.integers(1, 7)), "qk_nope_head_dim": draw(EVEN), "qk_rope_head_dim": 4}
    config |= {"v_head_dim": draw(EVEN), "attention_bias": draw(FLAG), "max_position_embeddings": 64, "tie_word_embeddings": draw(FLAG)}
    if family in ("deepseek_v32", "glm_moe_dsa"):
        config |= {"index_n_heads": draw(st.integers(1, 3)), "index_head_dim": draw(EVEN), "index_topk": 4}
    if family == "glm_moe_dsa":
        config |= {"index_topk_freq": draw(st.integers(1, 3)), "index_skip_topk_offset": draw(st.integers(0, 3))}
    return config


DENSE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "phi3")
STRATEGIES = {family: llama_like(family) for family in DENSE} | {
    "falcon": falcon(),
    "gpt2": gpt("gpt2"),
    "gpt_bigcode": gpt("gpt_bigcode"),
    "opt": opt(),
    "bloom": bloom(),
    **{family: routed(family) for family in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "minimax_m2")},
    **{family: latent(family) for family in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa")},
}


def built(config: dict[str, Any]) -> tuple[Any, int]:
    """transformers' config object and the number of parameters of its model (a tied head once)."""
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    return theirs, sum(parameter.numel() for parameter in model.parameters())


def corrections(model: ModelSpec) -> int:
    """What selects experts and is a buffer in transformers."""
    return sum(tensor.num_elements for tensor in model_tensors(model) if tensor.name.endswith("score_bias"))


@pytest.mark.parametrize("family", sorted(STRATEGIES))
def test_parameters_as_transformers_counts_them(family):
    assert family in FAMILIES

    @settings(max_examples=12, deadline=None, database=None)
    @given(STRATEGIES[family])
    def check(config: dict[str, Any]) -> None:
        ours = model_spec_from_config(config, "m")
        _, theirs = built(config)
        assert num_parameters(ours) - corrections(ours) == theirs, config

    check()


@pytest.mark.parametrize("family", [*DENSE, "gpt_oss"])
def test_windows_as_transformers_lays_them_out(family):
    """Which layers slide, by how much, and at which base they rotate."""

    @settings(max_examples=20, deadline=None, database=None)
    @given(routed(family) if family == "gpt_oss" else STRATEGIES[family])
    def check(config: dict[str, Any]) -> None:
        ours = model_spec_from_config(config, "m")
        theirs = transformers.AutoConfig.for_model(**config)
        kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if getattr(theirs, "sliding_window", None) else "full_attention"] * ours.L
        for layer, kind in zip(ours.layers, kinds, strict=True):
            mixer = layer.mixer
            assert isinstance(mixer, Attention)
            assert mixer.window == (theirs.sliding_window if kind == "sliding_attention" else None), config
            params = theirs.rope_parameters[kind] if "full_attention" in theirs.rope_parameters else theirs.rope_parameters
            assert mixer.rope is None or mixer.rope.theta == params["rope_theta"], config

    check()


ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("params", ROPES, ids=lambda params: params.get("rope_type", params.get("type")))
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_parameters_as_transformers_reads_them(family, params, key):
    config = {"model_type": family, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 9}
    config |= {"num_hidden_layers": 1, "intermediate_size": 8, "max_position_embeddings": 64, "rope_theta": 777.0, key: dict(params)}
    theirs = transformers.AutoConfig.for_model(**{**config, key: dict(params)}).rope_parameters
    mixer = model_spec_from_config(config, "m").layers[0].mixer
    assert isinstance(mixer, Attention) and mixer.rope is not None
    rope, scaling = mixer.rope, mixer.rope.scaling
    assert (rope.theta, rope.dims) == (theirs["rope_theta"], int(8 * theirs.get("partial_rotary_factor", 1.0)))
    assert theirs["rope_type"] == ("default" if scaling is None else scaling.kind)
    if scaling is not None:
        assert scaling.factor == theirs["factor"]
        assert scaling.original_context == theirs.get("original_max_position_embeddings", 64)
