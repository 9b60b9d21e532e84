"""Every runnable family against transformers, from the same folder on disk: logits within 1e-4 in fp32, packed and cached, through every kernel and layout."""

from __future__ import annotations

import pytest
import torch

from model.family_configs import CONTEXT, FAMILIES, V
from model.family_models import Pair, Stepper, make_pair, packed_logits
from tradespace.spec.mixers import Attention
from tradespace.spec.tensors import model_tensors

SEEDS = (0, 1, 2, 3)
LENGTHS = (23, 1, 40, 7)  # windows of 5 to 8 are crossed
# transformers' long factors begin with the first sequence that is longer than the trained context of 16, ours with an engine that may hold such a one
LONG_LENGTHS = (23, 17, 40, 19)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[(family, seed) for family in FAMILIES for seed in SEEDS], ids=lambda param: f"{param[0]}-{param[1]}")
def pair(request, tmp_path_factory) -> Pair:
    family, seed = request.param
    return make_pair(family, seed, tmp_path_factory.mktemp(family))


def _sequences(pair: Pair, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixer = pair.spec.layers[0].mixer
    assert isinstance(mixer, Attention)
    scaling = mixer.rope.scaling if mixer.rope else None
    is_long = scaling is not None and scaling.kind == "longrope" and scaling.original_context < CONTEXT
    return [torch.randint(0, V, (length,), generator=generator) for length in (LONG_LENGTHS if is_long else LENGTHS)]


def test_tensors_are_those_of_the_spec(pair):
    model = pair.ours(max_context=16)
    held = {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    assert held == {(tensor.name, tensor.shape) for tensor in model_tensors(pair.spec)}


@pytest.mark.parametrize("attention", ["reference", "chunked", "sdpa"])
def test_packed_logits(pair, attention):
    sequences = _sequences(pair, 1)
    scale = pair.logits(sequences[0]).std()
    assert 0.05 < scale < 100, f"logits of scale {scale} would make the comparison empty"
    for tokens_T, found_TV in zip(sequences, packed_logits(_model(pair, attention), sequences), strict=True):
        torch.testing.assert_close(found_TV, pair.logits(tokens_T), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layout", ["paged", "contiguous"])
@pytest.mark.parametrize("attention", ["reference", "chunked", "sdpa"])
def test_chunked_prefill_and_decode(pair, attention, layout):
    """Three sequences join at different steps, in chunks of odd sizes, down to one token: the logits are those of whole sequences."""
    sequences = _sequences(pair, 2)
    stepper = Stepper(_model(pair, attention), len(sequences), layout)
    found = {i: [] for i in range(len(sequences))}
    rest = dict.fromkeys(range(len(sequences)), CONTEXT)
    for sizes in ({0: 9}, {0: 5, 2: 17}, {0: 1, 2: 2, 3: 6}, {0: 1, 1: 1, 2: 1, 3: 1}, {0: 6, 2: 19}, rest):
        chunks = {i: sequences[i][stepper.lengths[i] :][:size] for i, size in sizes.items() if len(sequences[i]) > stepper.lengths[i]}
        for i, logits_TV in stepper.step(chunks).items():
            found[i].append(logits_TV)
    for i, tokens_T in enumerate(sequences):
        torch.testing.assert_close(torch.cat(found[i]), pair.logits(tokens_T), atol=TOLERANCE, rtol=0)


def test_greedy_tokens(pair):
    """64 positions, prompt included, decoded together with a neighbour: the tokens that transformers picks, position by position."""
    prompts = [torch.tensor([5, 11, 2]), torch.tensor([7])]
    stepper = Stepper(_model(pair, "sdpa"), len(prompts), "paged")
    texts = [prompt.tolist() for prompt in prompts]
    logits = stepper.step(dict(enumerate(prompts)))
    for _ in range(CONTEXT - 3):
        chosen = {i: logits_TV[-1].argmax().reshape(1) for i, logits_TV in logits.items()}
        for i, token in chosen.items():
            texts[i].append(int(token))
        logits = stepper.step(chosen)
    for prompt, text in zip(prompts, texts, strict=True):
        expected_TV = pair.logits(torch.tensor(text))
        top_T2 = expected_TV.topk(2).values
        decided = (top_T2[:, 0] - top_T2[:, 1] > 1e-3)[len(prompt) - 1 : -1]
        agree = (expected_TV.argmax(-1)[len(prompt) - 1 : -1] == torch.tensor(text[len(prompt) :])) | ~decided
        assert agree.all(), f"{(~agree).sum()} of {len(agree)} tokens differ"


def test_several_query_tokens_after_decode(pair):
    """What speculation needs: three tokens verified in one step give the logits of three steps of one, and a shorter retry overwrites them."""
    tokens_T = _sequences(pair, 3)[0]
    one, several = (Stepper(_model(pair, "sdpa"), 1, "paged") for _ in range(2))
    one.step({0: tokens_T[:9]})
    several.step({0: tokens_T[:9]})
    singly = [one.step({0: tokens_T[i : i + 1]})[0] for i in range(9, 12)]
    several.step({0: torch.tensor([1, 2, 3])})
    several.lengths[0] = 9  # the draft was rejected
    torch.testing.assert_close(several.step({0: tokens_T[9:12]})[0], torch.cat(singly), atol=TOLERANCE, rtol=0)


_MODELS: dict[tuple, object] = {}


def _model(pair: Pair, attention: str):
    """One model per pair and kernel."""
    key = (pair.folder, attention)
    if key not in _MODELS:
        _MODELS.clear() if len(_MODELS) > 2 else None
        _MODELS[key] = pair.ours(max_context=CONTEXT, attention=attention)
    return _MODELS[key]
