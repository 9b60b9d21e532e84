"""Several outputs of one prompt, forks and shared prefixes through the whole engine: on the hash machine, and on a small Transformer over a real cache."""

import random

import pytest
import torch

from engine.fakes import Pieces, V, hash_engine
from engine.oracle import check_blocks
from engine.test_engine import ALONE, EACH, PROMPTS, outputs
from engine.test_engine_model import V as MODEL_V
from engine.test_engine_model import engine_of, kernel, model
from tradespace.engine.request import SamplingParams
from tradespace.engine.speculative import NgramDrafter
from tradespace.errors import EngineError, InputError

__all__ = ["kernel", "model"]  # fixtures
torch.set_num_threads(1)

SHARED = {"prefix_sharing": True}


@pytest.mark.parametrize(
    "changes", [{}, {"max_sequences": 3}, {"step_tokens": 1}, {"step_tokens": 5, "block_size": 1, "kv_tokens": 64}, {"kv_tokens": 72}, {"block_size": 64}]
)
def test_sharing_changes_nothing(changes):
    """Twice in a row over one cache: the second time the prompts are known, and the draws, logprobs and ends are still the same."""
    engine = hash_engine(eos_ids=(0,), **SHARED, **changes)
    for _ in range(2):
        assert outputs(engine.generate(PROMPTS, EACH)) == ALONE
        assert engine.scheduler.allocator.num_used == 0
        check_blocks(engine.scheduler)
    hits, queries = engine.counters.prefix_cache_hits, engine.counters.prefix_cache_queries
    assert 0 < hits < queries if changes.get("block_size") != 64 else hits == 0 < queries


def test_samples_of_one_prompt_differ_and_are_what_their_numbers_say():
    """Equal with sharing, without it, in the contiguous layout, one after the other: the noise depends on seed, number and position alone."""
    params = SamplingParams(seed=3, max_tokens=14, n=5)
    found = []
    for changes in ({}, SHARED, {"layout": "contiguous"}, {"max_sequences": 1, **SHARED}, {"kv_tokens": 64, **SHARED}, {"policy": "fixed"}):
        engine = hash_engine(**changes)
        first, other = engine.generate([PROMPTS[0], PROMPTS[1]], [params, SamplingParams(seed=3, max_tokens=4)])
        assert [sample.sample for sample in first.samples] == list(range(5)) and not other.siblings
        assert engine.scheduler.allocator.num_used == 0
        found.append([sample.output_ids for sample in first.samples])
    assert all(outputs == found[0] for outputs in found)
    assert len(set(found[0])) == 5
    alone = hash_engine().generate([PROMPTS[0]], SamplingParams(seed=3, max_tokens=14))
    assert alone[0].output_ids == found[0][0], "the first of n is the one that a request for one gets"


def test_greedy_samples_are_equal_and_the_prompt_is_computed_once():
    engine = hash_engine(**SHARED)
    (first,) = engine.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=6, n=4))
    assert len({sample.output_ids for sample in first.samples}) == 1
    length = len(PROMPTS[2])
    assert engine.counters.tokens == length + 3 + 4 * 5  # each fork computes the last token again
    assert [sample.num_cached for sample in first.samples] == [0, *[length - 1] * 3]


def test_text_of_samples_and_of_a_fork():
    engine = hash_engine(tokenizer=Pieces(), **SHARED)
    params = SamplingParams(seed=4, max_tokens=20, n=3, ignore_eos=True)
    (first,) = engine.generate(["abc xyz"], params)
    assert len({sample.text for sample in first.samples}) == 3 and all(sample.text for sample in first.samples)
    request = engine.add("abc xyz", SamplingParams(seed=4, max_tokens=20, ignore_eos=True))
    while request.num_outputs < 8:
        engine.step()
    fork = engine.fork(request)
    assert fork.text == request.text and fork.output_ids == request.output_ids
    while engine.has_work:
        engine.step()
    assert request.text == first.text
    assert fork.text != request.text and fork.text[:4] == request.text[:4] and fork.num_outputs == 20
    assert not engine._texts


def test_aborting_a_request_aborts_its_siblings():
    engine = hash_engine(**SHARED)
    request = engine.add(PROMPTS[3], SamplingParams(max_tokens=9, n=4))
    engine.step()
    engine.abort(request)
    assert not engine.has_work and {member.finish_reason for member in (request, *request.siblings)} == {"abort"}
    assert engine.scheduler.allocator.num_used == 0


def test_a_failed_step_with_forks_leaves_a_sound_cache():
    engine = hash_engine(max_sequences=3, **SHARED)
    engine.runner.transformer.raises = RuntimeError("broken")
    with pytest.raises(EngineError, match="broken"):
        engine.generate([PROMPTS[3]], SamplingParams(temperature=0, max_tokens=5, n=6))
    assert not engine.has_work and engine.scheduler.allocator.num_used == 0
    again = engine.generate([PROMPTS[3]], SamplingParams(temperature=0, max_tokens=5, n=6))[0]
    right = hash_engine().generate([PROMPTS[3]], SamplingParams(temperature=0, max_tokens=5))[0]
    assert all(sample.output_ids == right.output_ids for sample in again.samples)


def test_a_stream_is_one_text():
    with pytest.raises(InputError, match=r"n is 2\. Use generate"):
        hash_engine(tokenizer=Pieces()).stream("abc", SamplingParams(n=2))


def test_an_id_that_a_sample_would_need_is_refused_before_anything_runs():
    engine = hash_engine()
    engine.add([1, 2], SamplingParams(max_tokens=2), id="x.1")
    with pytest.raises(InputError, match=r"'x\.1' is under way"):
        engine.add([1, 2], SamplingParams(max_tokens=2, n=2), id="x")
    assert len(engine.scheduler.waiting) == 1


def test_forgetting_makes_everybody_compute():
    engine = hash_engine(**SHARED)
    params = SamplingParams(temperature=0, max_tokens=4)
    for _ in range(2):
        engine.generate([PROMPTS[2]], params)
        assert engine.counters.prefix_cache_hits == 0
        engine.forget_prefixes()
    engine.generate([PROMPTS[2]] * 2, params)
    assert engine.counters.prefix_cache_hits > 0


def test_random_families_forks_and_aborts():
    pick = random.Random(11)
    engine = hash_engine(eos_ids=(0,), kv_tokens=96, step_tokens=20, **SHARED)
    beginnings = [tuple(pick.randrange(1, V) for _ in range(16)) for _ in range(3)]
    prompts = [pick.choice(beginnings)[: pick.randint(0, 16)] + tuple(pick.randrange(1, V) for _ in range(pick.randint(1, 8))) for _ in range(60)]
    params = [SamplingParams(seed=i, max_tokens=pick.randint(1, 20), temperature=pick.choice([0.0, 1.0]), n=pick.choice([1, 1, 2, 3])) for i in range(60)]
    right = [hash_engine(eos_ids=(0,)).generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]
    queue, running = list(range(60)), {}
    while queue or engine.has_work:
        if queue and (pick.random() < 0.4 or not engine.has_work):
            index = queue.pop()
            running[index] = engine.add(prompts[index], params[index])
        engine.step()
        check_blocks(engine.scheduler)
        if pick.random() < 0.05 and running:
            engine.abort(pick.choice(list(running.values())))
    for index, request in running.items():
        for member, completion in zip((request, *request.siblings), right[index].samples, strict=True):
            wanted = completion.output_ids[: member.num_outputs] if member.finish_reason == "abort" else completion.output_ids
            assert tuple(member.output_ids) == wanted
    assert engine.counters.preemptions > 0 and engine.counters.copied_blocks > 0


PICK = random.Random(9)
PREFIX = tuple(PICK.randrange(MODEL_V) for _ in range(37))
FAMILY = [
    PREFIX[:length] + tuple(PICK.randrange(MODEL_V) for _ in range(own)) for length, own in [(37, 3), (37, 1), (30, 9), (37, 0), (32, 0), (16, 20), (37, 0)]
]
SAMPLED = [SamplingParams(temperature=0, max_tokens=16, n=2) if i % 2 else SamplingParams(seed=i, max_tokens=20, top_p=0.9, n=1 + i % 3) for i in range(7)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"step_tokens": 11}, {"kv_tokens": 96}, {"block_size": 1, "kv_tokens": 130}, {"drafter": NgramDrafter(), "max_sequences": 3}],
    ids=lambda changes: ",".join(changes) or "at once",
)
def test_tokens_of_a_real_model_do_not_depend_on_sharing(model, kernel, changes):
    """A window layer among full ones, chunks, preemptions, drafts, forks: with the reference kernels bit for bit, with others up to the drawn token."""
    shared = engine_of(model, prefix_sharing=True, **changes)
    for _ in range(2):
        completions = shared.generate(FAMILY, SAMPLED)
        for prompt, params, completion in zip(FAMILY, SAMPLED, completions, strict=True):
            alone = engine_of(model, step_tokens=96).generate([prompt], params)[0]
            assert [sample.output_ids for sample in completion.samples] == [sample.output_ids for sample in alone.samples]
    assert shared.counters.prefix_cache_hits > 200 and shared.counters.copied_blocks > 0
    assert not changes.get("kv_tokens") or shared.counters.preemptions > 0
    assert shared.scheduler.allocator.num_used == 0
