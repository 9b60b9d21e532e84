"""What-if: a change keeps what it does not name; equal parameters are as near as whole layers allow."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import InputError
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, ModelSpec
from tradespace.spec.tensors import num_parameters
from tradespace.spec.what_if import parse_what_if, what_if
from tradespace.spec.zoo import find_model

LLAMA = find_model("llama-2-70b")


def shape(model: ModelSpec) -> tuple[int, int, int, int, int, int]:
    mixer, ffn = model.layers[0].mixer, model.layers[0].ffn
    assert isinstance(mixer, Attention) and isinstance(ffn, DenseFFN)
    return model.L, model.D, mixer.N, mixer.K, mixer.H, ffn.F


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers=40", (40, 8192, 64, 8, 128, 28672)),
        ("width=16384", (80, 16384, 128, 16, 128, 57344)),
        ("width=16384,heads=64", (80, 16384, 64, 8, 128, 57344)),
        ("kv_heads=64", (80, 8192, 64, 64, 128, 28672)),
        ("kv_heads=1", (80, 8192, 64, 1, 128, 28672)),
        ("ffn_ratio=4", (80, 8192, 64, 8, 128, 32768)),
        ("layers=40,width=4096,heads=16,kv_heads=4,ffn_ratio=3.5", (40, 4096, 16, 4, 128, 14336)),
    ],
)
def test_changes(text, expected):
    model = what_if(LLAMA, **parse_what_if(text))  # pyright: ignore[reportArgumentType]
    assert shape(model) == expected and model.plan_only and model.V == LLAMA.V


def test_64_kv_heads_take_eight_times_the_cache():
    assert what_if(LLAMA, kv_heads=64).cache_elements_per_token == 8 * LLAMA.cache_elements_per_token


def test_context_takes_a_learned_table_along():
    model = what_if(find_model("gpt2"), context=4096)
    assert (model.max_context, model.learned_positions) == (4096, 4096)
    assert num_parameters(model) - num_parameters(find_model("gpt2")) == 3072 * 768


def test_a_pattern_of_layers_repeats():
    model = what_if(find_model("gemma-3-1b"), layers=13)
    assert [layer.mixer.window is None for layer in model.layers if layer.mixer] == [i % 6 == 5 for i in range(13)]
    assert model.embed_scale == find_model("gemma-3-1b").embed_scale


@settings(max_examples=40, deadline=None)
@given(
    factor=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([None, 1, 8, 64]),
    ratio=st.floats(1, 8),
    name=st.sampled_from(["llama-2-70b", "gemma-2-9b", "gpt2-xl"]),
)
def test_equal_parameters_are_as_near_as_whole_layers_allow(factor, kv_heads, ratio, name):
    model = find_model(name)
    width = model.D * factor // 2
    heads = 64 if kv_heads else None
    try:
        made = what_if(model, width=width, heads=heads, kv_heads=kv_heads, ffn_ratio=ratio, equal_parameters=True)
    except InputError:  # half of 25 heads
        assert name == "gpt2-xl" and factor == 1
        return
    target = num_parameters(model)
    gap = abs(num_parameters(made) - target)
    for depth in (made.L - 1, made.L + 1):
        if 1 <= depth <= 4096:
            other = what_if(model, width=width, heads=heads, kv_heads=kv_heads, ffn_ratio=ratio, layers=depth)
            assert gap <= abs(num_parameters(other) - target)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("depth=40", "unknown change 'depth'"),
        ("layers=forty", "needs a number"),
        ("layers", "needs a number"),
        ("layers=1,layers=2", "twice"),
        ("", "no change"),
        ("layers=0", "between 1 and 4096"),
        ("layers=1000000000000", "between 1 and 4096"),
        ("ffn_ratio=nan", "ffn_ratio"),
        ("ffn_ratio=-1", "ffn_ratio"),
        ("kv_heads=7", "do not divide"),
        ("heads=60", "groups of 8"),
        ("width=1000", "give heads too"),
        ("layers=40,equal_parameters", "both decide"),
        ("equal_parameters=maybe", "true or false"),
    ],
)
def test_clear_errors(text, names):
    with pytest.raises(InputError, match=names):
        what_if(LLAMA, **parse_what_if(text))  # pyright: ignore[reportArgumentType]


def test_only_dense_attention_can_be_reshaped():
    with pytest.raises(InputError, match="mixtral"):
        what_if(find_model("mixtral-8x7b"), layers=2)


def test_a_model_whose_last_layer_alone_differs_follows_no_pattern():
    model = find_model("gpt2")
    last = replace(model.layers[-1], arrangement="parallel")
    with pytest.raises(InputError, match="no pattern"):
        what_if(replace(model, layers=(*model.layers[:-1], last)), layers=5)
