"""The zoo: names people use, totals that were published, numbers that the issue names."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradespace.errors import InputError
from tradespace.spec.tensors import active_parameters, num_parameters
from tradespace.spec.zoo import ALIASES, PUBLISHED_PARAMETERS, ZOO, _key, find_model, zoo_names

# what the issue demands, apart from the table that it checks
DEMANDED = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800, "mistral-7b-v0.1": 7_241_732_096, "qwen3-8b": 8_190_735_360,
    "gpt2": 124_439_808, "smollm2-135m": 134_515_008, "gemma-2-2b": 2_614_341_888, "gemma-3-270m": 268_098_176,
    "phi-3-mini-4k": 3_821_079_552, "falcon-7b": 6_921_720_704, "bloom-176b": 176_247_271_424, "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200, "gpt2-xl": 1_557_611_200, "starcoder": 15_517_456_384, "smollm3-3b": 3_075_098_624,
}  # fmt: skip


@pytest.mark.parametrize("name", DEMANDED)
def test_parameters_to_the_last_one(name):
    assert num_parameters(find_model(name)) == DEMANDED[name]


@pytest.mark.parametrize("name", sorted(PUBLISHED_PARAMETERS))
def test_published_totals(name):
    assert num_parameters(find_model(name)) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", zoo_names())
def test_every_entry_plans_under_its_own_name(name):
    model = find_model(name)
    assert model.name == name and model.L > 0 and num_parameters(model) > 10**8
    assert model is find_model(name.upper())
    assert 0 < active_parameters(model) <= num_parameters(model)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("meta-llama/Llama-2-70b-hf", "llama-2-70b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("llama2-7b", "llama-2-7b"),
        ("LLAMA-2-70B", "llama-2-70b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", None),
        ("mistral-7b", "mistral-7b-v0.1"),
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("google/gemma-3-270m-it", "gemma-3-270m"),
        ("openai-community/gpt2", "gpt2"),
        ("gpt-2", "gpt2"),
        ("facebook/opt-1.3b", "opt-1.3b"),
        ("facebook/opt-13b", "opt-13b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini-4k"),
        ("bigscience/bloom", "bloom-176b"),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", "llama-3.3-nemotron-super-49b"),
    ],
)
def test_names_that_people_use(asked, found):
    if found is None:
        with pytest.raises(InputError, match="Did you mean"):
            find_model(asked)
    else:
        assert find_model(asked).name == found


def test_a_miss_says_what_was_meant_and_what_else_works():
    with pytest.raises(InputError, match=r"(?s)Did you mean .*llama-2-70b.*folder.*GGUF.*hub"):
        find_model("llama-2-70c")


@given(st.text(max_size=300))
def test_any_name_is_found_or_an_input_error(name):
    with contextlib.suppress(InputError):
        assert find_model(name).name in ZOO


def test_no_two_names_collide_and_aliases_lead_somewhere():
    assert len({_key(name) for name in ZOO}) == len(ZOO)
    assert all(target in ZOO for target in ALIASES.values())


def test_kv_of_the_issue():
    """GPT-3: 4.72 MB a token in fp16; Llama-2-70B: 327,680 bytes, an eighth of what 64 KV heads would take."""
    assert find_model("gpt-3-175b").cache_elements_per_token * 2 == 4_718_592
    assert find_model("llama-2-70b").cache_elements_per_token * 2 == 327_680
    assert find_model("deepseek-v3").cache_elements_per_token == 61 * 576


def test_mixtures_know_what_one_token_touches():
    """Model cards round: 30B-A3B, 235B-A22B, 671B with 37B, 20b with 3.6B."""
    for name, billions in (("qwen3-30b-a3b", 3.0), ("qwen3-235b-a22b", 21.6), ("deepseek-v3", 36.7), ("gpt-oss-20b", 3.61)):
        assert active_parameters(find_model(name)) / 1e9 == pytest.approx(billions, rel=0.05)
