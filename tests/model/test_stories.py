"""A real trained model: the text that another program (llama2.c) prints for it, on every format and kernel that should keep it."""

from __future__ import annotations

import pytest
import torch

from helpers_stories import BOS, GREEDY_TEXT, decode, load_stories, stories_spec
from model.family_models import Stepper
from tradespace.spec.tensors import num_parameters
from tradespace.spec.weights import WeightPlan


def _greedy(stepper: Stepper, count: int) -> list[int]:
    tokens = [BOS]
    for _ in range(count):
        tokens.append(int(stepper.step({0: torch.tensor(tokens[-1:])})[0][-1].argmax()))
    return tokens[1:]


def test_parameters():
    assert num_parameters(stories_spec()) == 260_032


@pytest.mark.parametrize(
    ("attention", "linear", "layout"), [("sdpa", "torch", "paged"), ("chunked", "torch", "contiguous"), ("reference", "reference", "paged")]
)
def test_greedy_text_is_that_of_llama2c(attention, linear, layout):
    model = load_stories(WeightPlan(default="fp32"), attention=attention, linear=linear, max_context=256)
    assert decode(_greedy(Stepper(model, 1, layout), 215)).startswith(GREEDY_TEXT)


@pytest.mark.parametrize(("name", "agreement"), [("bf16", 0.98), ("fp16", 0.99), ("int8", 0.95)])
def test_formats_predict_the_same_tokens(name, agreement):
    """Teacher-forced over the known text: top-1 agreement with fp32, both with few rows a step (fused kernels) and with many (dequantized)."""
    exact = load_stories(WeightPlan(default="fp32"), max_context=256)
    tokens_T = torch.tensor([BOS, *_greedy(Stepper(exact, 1, "paged"), 199)])
    expected_T = tokens_T[1:]
    model = load_stories(WeightPlan(default=name), max_context=256)
    many = Stepper(model, 1, "paged").step({0: tokens_T[:-1]})[0].argmax(-1)
    few_stepper = Stepper(model, 1, "paged")
    few = torch.cat([few_stepper.step({0: chunk})[0].argmax(-1) for chunk in tokens_T[:-1].split(5)])
    for found_T in (many, few):
        assert (found_T == expected_T).float().mean() >= agreement
