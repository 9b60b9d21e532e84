"""A config that lies, or says what we do not understand, is an error that names the field; the work stays bounded."""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import InputError, UnsupportedError
from tradespace.spec.families import FAMILIES, REFUSED, model_spec_from_config
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import num_parameters
from unit.config_samples import LLAMA, SAMPLES


@pytest.mark.parametrize("family", sorted(SAMPLES))
@pytest.mark.parametrize(
    ("key", "value"), [("use_rope", False), ("residual_multiplier", 0.22), ("attention_multiplier", 0.1), ("mup_scale", 1), ("clip_qkv", 8.0)]
)
def test_an_unread_key_is_refused_by_name(family, key, value):
    with pytest.raises(UnsupportedError, match=key):
        model_spec_from_config(SAMPLES[family] | {key: value}, "m")


@pytest.mark.parametrize("family", sorted(SAMPLES))
@pytest.mark.parametrize("key", ["use_rope", "residual_multiplier"])
def test_an_unknown_key_that_is_null_says_nothing(family, key):
    assert model_spec_from_config(SAMPLES[family] | {key: None}, "m") == model_spec_from_config(SAMPLES[family], "m")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_attention_heads": 33}, "num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -8}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "float3"}, "torch_dtype"),
        ({"rope_scaling": [2.0]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "ntk-by-parts", "factor": 2.0}}, "ntk-by-parts"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1}}, "alpha"),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "factor"),
        ({"hidden_act": "xielu"}, "xielu"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": "int8"}, "quantization_config"),
    ],
)
def test_nonsense_is_an_error_that_names_the_field(change, names):
    with pytest.raises(InputError, match=names):
        model_spec_from_config(LLAMA | change, "m")


def test_two_names_for_one_thing_must_agree():
    with pytest.raises(InputError, match="two names"):
        model_spec_from_config(SAMPLES["gpt2"] | {"hidden_size": 1024}, "m")
    assert model_spec_from_config(SAMPLES["gpt2"] | {"hidden_size": 768}, "m").D == 768


def test_a_hostile_value_is_cut_in_the_message():
    with pytest.raises(InputError) as caught:
        model_spec_from_config(LLAMA | {"hidden_act": "x" * 10**6}, "m")
    assert len(str(caught.value)) < 600


_ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 10**13),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-1, 9), max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers()),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_model_or_an_input_error(data):
    """One to three fields of a good config replaced by anything: never another exception, never long work."""
    config = dict(SAMPLES[data.draw(st.sampled_from(sorted(SAMPLES)))])
    for key in data.draw(st.lists(st.sampled_from([*sorted(config), "rope_scaling", "rope_parameters", "layer_types", "head_dim"]), min_size=1, max_size=3)):
        config[key] = data.draw(_ANY)
    started = time.perf_counter()
    with contextlib.suppress(InputError):
        assert isinstance(model_spec_from_config(config, "m"), ModelSpec)
    assert time.perf_counter() - started < 2


@settings(max_examples=100, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), config=st.dictionaries(st.sampled_from(["hidden_size", "text_config", "block_configs", "vocab_size"]), _ANY))
def test_any_family_refuses_an_empty_or_wild_config(family, config):
    with pytest.raises(InputError):
        model_spec_from_config({**config, "model_type": family, "num_hidden_layers": 0}, "m")


@settings(max_examples=50, deadline=None)
@given(config=st.dictionaries(st.text(max_size=6), _ANY, max_size=4), family=_ANY)
def test_any_dictionary_at_all(config, family):
    with pytest.raises(InputError):
        model_spec_from_config({**config, "model_type": family}, "m")


def test_the_largest_depth_allowed_is_still_quick():
    started = time.perf_counter()
    model = model_spec_from_config(LLAMA | {"num_hidden_layers": 4096}, "m")
    assert num_parameters(model) > 0 and time.perf_counter() - started < 5
    assert not set(REFUSED) & set(FAMILIES)
