"""The one list of tensors: names unique, roles known, counts that add up, states and caches of the mixers that are not attention."""

from dataclasses import replace
from math import prod

import pytest

from tradespace.spec.mixers import Mixer
from tradespace.spec.mixers_latent import LatentAttention, SparseIndex
from tradespace.spec.mixers_recurrent import GatedDeltaNet, KimiDeltaAttention, LightningAttention, Mamba2
from tradespace.spec.tensors import ROLES, active_parameters, model_tensors, num_parameters, parameters_by_role
from tradespace.spec.zoo import find_model, zoo_names

MIXERS = {
    "mla": LatentAttention(N=128, kv_rank=512, nope_H=128, rope_H=64, value_H=128, q_rank=1536),
    "dsa": LatentAttention(N=128, kv_rank=512, nope_H=128, rope_H=64, value_H=128, q_rank=1536, index=SparseIndex(N=64, H=128, top_k=2048)),
    "mamba2": Mamba2(N=128, H=64, S=128, groups=8),
    "delta": GatedDeltaNet(N=32, K=16, H=128, value_H=128),
    "kda": KimiDeltaAttention(N=32, H=128),
    "lightning": LightningAttention(N=64, H=128),
}


@pytest.mark.parametrize("name", zoo_names())
def test_names_are_unique_and_roles_known(name):
    model = find_model(name)
    tensors = model_tensors(model)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert all(tensor.role in ROLES and all(side > 0 for side in tensor.shape) for tensor in tensors)
    assert sum(parameters_by_role(model).values()) == num_parameters(model) == sum(prod(tensor.shape) for tensor in tensors)


def test_roles_of_llama_2_7b():
    """32 layers of 4·D² attention and 3·D·F feed-forward, two tables of V·D, 65 norms."""
    D, F, V = 4096, 11008, 32000
    assert parameters_by_role(find_model("llama-2-7b")) == {
        "embed": V * D,
        "qkv": 32 * 3 * D * D,
        "attn_out": 32 * D * D,
        "gate_up": 32 * 2 * D * F,
        "down": 32 * D * F,
        "lm_head": V * D,
        "norm": 65 * D,
    }


def test_a_tied_head_is_counted_once():
    model = find_model("smollm2-135m")
    assert num_parameters(replace(model, tied=False)) - num_parameters(model) == model.V * model.D
    assert active_parameters(model) == num_parameters(model)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_keep_the_contract(name):
    mixer = MIXERS[name]
    assert isinstance(mixer, Mixer) and mixer.window is None
    assert all(tensor.role in ROLES for tensor in mixer.tensors(64))
    assert (mixer.cache_elements_per_token == 0) == (mixer.state_bytes_per_sequence > 0)


def test_bytes_that_papers_state():
    """DeepSeek-V3 caches 576 elements a token and layer whatever its 128 heads; the sparse index adds a key of 128."""
    assert MIXERS["mla"].cache_elements_per_token == 576
    assert MIXERS["dsa"].cache_elements_per_token == 704
    # a state of H × S in fp32 per head, and three steps of the convolution's 128·64 + 2·8·128 channels in 16 bits
    assert MIXERS["mamba2"].state_bytes_per_sequence == 128 * 64 * 128 * 4 + 10240 * 3 * 2
    assert MIXERS["delta"].state_bytes_per_sequence == 32 * 128 * 128 * 4 + 8192 * 3 * 2
    assert MIXERS["lightning"].state_bytes_per_sequence == 64 * 128 * 128 * 4
