"""Decode steps whose inputs are filled in place give the same bits as any other step, whoever comes, leaves, is preempted or shares blocks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from native.test_recorded import _random_model
from native.test_sharing import CONTEXT, SPEC, engine_of
from tradespace.engine.engine import Engine
from tradespace.engine.request import SamplingParams
from tradespace.kernels.native import unavailable
from tradespace.model.transformer import Transformer
from tradespace.spec.weights import WeightPlan

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"native kernels: {unavailable()}")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return _random_model(SPEC, WeightPlan(default="bf16", layout="native"))


def counted(engine: Engine) -> list[int]:
    """How many sequences each step through the frame had, from now on."""
    frame, found = engine.runner._frame, []  # pyright: ignore[reportAttributeAccessIssue]
    run = frame.run

    def counting(count: int) -> torch.Tensor:
        found.append(count)
        return run(count)

    frame.run = counting
    return found


@pytest.mark.parametrize(
    ("prefix_sharing", "changes"), [(False, {}), (True, {}), (True, {"step_tokens": 19}), (True, {"kv_tokens": CONTEXT}), (False, {"max_sequences": 2})]
)
def test_the_same_bits_as_without_it(model: Transformer, prefix_sharing: bool, changes: dict[str, Any]):
    pick = random.Random(7)
    prompts = [[pick.randrange(53) for _ in range(length)] for length in (1, 17, 70, 70, 33, 5, 1)]
    prompts[3] = prompts[2][:64] + prompts[3][:6]
    params = [SamplingParams(seed=i, max_tokens=5 + 9 * i, n=1 + i % 2) for i in range(len(prompts))]
    with_frame, without = (engine_of(model, prefix_sharing=prefix_sharing, **changes) for _ in range(2))
    without.runner._frame = None  # pyright: ignore[reportAttributeAccessIssue]
    sizes = counted(with_frame)
    for _ in range(2):
        ours, theirs = with_frame.generate(prompts, params), without.generate(prompts, params)
        for mine, other in zip(ours, theirs, strict=True):
            assert [sample.output_ids for sample in mine.samples] == [sample.output_ids for sample in other.samples]
    found, right = with_frame.sampler.seen, without.sampler.seen  # pyright: ignore[reportAttributeAccessIssue]
    assert found.keys() == right.keys() and all(torch.equal(logits_V, right[key]) for key, logits_V in found.items())
    assert len(sizes) > 40 and len(set(sizes)) > 1, "steps of several sizes went through the frame"
    assert "kv_tokens" not in changes or with_frame.counters.preemptions > 0


def test_steps_that_ask_for_more_go_the_other_way(model: Transformer):
    engine = engine_of(model, prefix_sharing=False)
    sizes = counted(engine)
    engine.generate([[3, 4, 5]], SamplingParams(max_tokens=1))
    assert not sizes, "a prompt of several tokens"
    [completion] = engine.generate([[3]], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    assert not sizes, "somebody asks for a prompt's log-probabilities"
    engine.generate([[3, 4, 5]], SamplingParams(max_tokens=4, logprobs=2))
    assert sizes == [1] * 3
    assert completion.output_ids == engine.generate([[3]], SamplingParams(temperature=0, max_tokens=1))[0].output_ids
