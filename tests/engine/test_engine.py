"""The engine on the hash machine: same tokens alone and in company, stops, streams, failures and interrupts."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fakes import PIECES, AnyDrafter, Pieces, V, hash_engine
from engine.oracle import check_blocks
from tradespace.engine.request import SamplingParams
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.speculative import NgramDrafter
from tradespace.engine.text import StopStrings
from tradespace.errors import EngineError, InputError

torch.set_num_threads(1)

PARAMS = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.8, frequency_penalty=0.5),
    SamplingParams(seed=1, max_tokens=20),
    SamplingParams(seed=2, max_tokens=7, top_k=5, logprobs=3),
    SamplingParams(seed=2, max_tokens=25, top_p=0.8, temperature=0.7, presence_penalty=1.0),
    SamplingParams(seed=3, max_tokens=16, min_p=0.1, min_tokens=6, logit_bias={4: 2.0}),
]


def prompts_of(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    pick = random.Random(seed)
    return [tuple(pick.randrange(1, V) for _ in range(pick.randint(1, 35))) for _ in range(count)]


def alone(prompts, params, **changes):
    return [hash_engine(**changes).generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]


def outputs(completions):
    return [(done.output_ids, done.finish_reason, done.logprobs) for done in completions]


PROMPTS, EACH = prompts_of(18), PARAMS * 3
ALONE = outputs(alone(PROMPTS, EACH, eos_ids=(0,)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_sequences": 3},
        {"step_tokens": 1},
        {"step_tokens": 5, "block_size": 1, "kv_tokens": 64},
        {"kv_tokens": 72},
        {"layout": "contiguous", "max_sequences": 4},
        {"policy": "fixed", "max_sequences": 5},
        {"layout": "contiguous", "policy": "fixed"},
    ],
)
def test_company_chunks_preemption_and_layout_change_nothing(changes):
    engine = hash_engine(eos_ids=(0,), **changes)
    assert outputs(engine.generate(PROMPTS, EACH)) == ALONE
    assert engine.scheduler.allocator.num_used == 0
    if changes.get("kv_tokens"):
        assert engine.counters.preemptions > 0


@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
def test_drafts_change_nothing(wrong):
    """Greedy and sampled, with penalties, logprobs and stops: right, partly right and wrong drafts, also while preempted."""
    answers = {prompt: list(output) for prompt, (output, _, _) in zip(PROMPTS, ALONE, strict=True)}
    for changes in ({}, {"kv_tokens": 72}):
        engine = hash_engine(eos_ids=(0,), drafts=4, drafter=AnyDrafter(answers, wrong), **changes)
        assert outputs(engine.generate(PROMPTS, EACH)) == ALONE
        assert engine.counters.draft_tokens > 60
        share = engine.counters.accepted_drafts / engine.counters.draft_tokens
        assert share > 0.9 if wrong == 0 else share < 0.6


def test_the_ngram_drafter_copies_what_followed():
    engine = hash_engine()
    few = SamplingParams(max_tokens=9)
    assert NgramDrafter(count=3).propose(engine.add([1, 2, 3, 4, 5, 9, 2, 3], few)) == [4, 5, 9]
    assert NgramDrafter(count=3).propose(engine.add([1, 2, 3], few)) == []
    assert NgramDrafter(count=3, shortest=2).propose(engine.add([1, 2, 5, 2], few)) == []
    drafted = hash_engine(eos_ids=(0,), drafts=4, drafter=NgramDrafter())
    assert outputs(drafted.generate(PROMPTS, EACH)) == ALONE and drafted.counters.draft_tokens > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kv_tokens=st.sampled_from([64, 80, 200]), step_tokens=st.integers(1, 40), drafts=st.sampled_from([0, 3]))
def test_random_arrivals_and_aborts(seed, kv_tokens, step_tokens, drafts):
    pick = random.Random(seed)
    answers = {prompt: list(output) for prompt, (output, _, _) in zip(PROMPTS, ALONE, strict=True)}
    engine = hash_engine(eos_ids=(0,), kv_tokens=kv_tokens, step_tokens=step_tokens, drafts=drafts, drafter=AnyDrafter(answers, 0.3) if drafts else None)
    queue = list(range(len(PROMPTS)))
    pick.shuffle(queue)
    running = {}
    while queue or engine.has_work:
        if queue and (pick.random() < 0.4 or not engine.has_work):
            index = queue.pop()
            running[index] = engine.add(PROMPTS[index], EACH[index], priority=pick.choice([0, 0, 1]))
        engine.step()
        check_blocks(engine.scheduler)
        if pick.random() < 0.05:
            engine.abort(running[pick.choice(list(running))])
    for index, request in running.items():
        right = ALONE[index]
        if request.finish_reason == "abort":
            assert tuple(request.output_ids) == right[0][: request.num_outputs]
        else:
            assert (tuple(request.output_ids), request.finish_reason, tuple(request.logprobs)) == right
    assert engine.scheduler.allocator.num_used == 0 and not engine._texts


def test_text_streams_as_generate_has_it_and_others_advance_beside_it():
    engine = hash_engine(tokenizer=Pieces())
    params = SamplingParams(seed=4, max_tokens=20)
    (whole,) = engine.generate(["abc xyz"], params)
    other = engine.add("cab", params)
    with engine.stream("abc xyz", params) as stream:
        pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.completion.text and len(pieces) > 5
    assert other.num_outputs > 0
    assert stream.completion.ttft_s is not None and stream.completion.tpot_s is not None
    assert whole.text == "".join(PIECES[token] for token in whole.output_ids)


def test_a_stream_that_is_dropped_or_closed_is_aborted():
    engine = hash_engine(tokenizer=Pieces())
    stream = engine.stream("abc", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    next(stream)
    request = stream.request
    with pytest.raises(InputError, match="has not ended"):
        _ = stream.completion
    del stream
    assert request.finish_reason == "abort" and not engine.has_work and engine.scheduler.allocator.num_used == 0
    stream = engine.stream("abc", SamplingParams(max_tokens=3))
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_stop_string_ends_the_output_and_is_not_in_it(size):
    """Every substring of a free run's text, as a stop string: cut at its first occurrence, held back while it may still come."""
    params = SamplingParams(seed=9, max_tokens=24, ignore_eos=True)
    free = hash_engine(tokenizer=Pieces()).generate(["abcabc"], params)[0].text
    assert len(free) > 12
    for start in range(len(free) - size):
        stop = free[start : start + size]
        engine = hash_engine(tokenizer=Pieces())
        with engine.stream("abcabc", SamplingParams(seed=9, max_tokens=24, ignore_eos=True, stop=(stop, "no such text"))) as stream:
            text = "".join(stream)
        assert text == free[: free.find(stop)] and stream.completion.finish_reason == "stop"
        assert engine.scheduler.allocator.num_used == 0 and not engine._texts


@pytest.mark.parametrize(
    ("stops", "pushed", "text", "found"),
    [
        (("cd", "b"), ["abcd"], "a", "b"),
        (("b", "cd"), ["abcd"], "a", "b"),
        (("abc", "ab"), ["xabc"], "x", "abc"),
        (("aab",), ["a", "a", "a", "b", "c"], "a", "aab"),
        (("abx",), ["a", "b", "a", "b"], "abab", None),
        ((), ["a", "b"], "ab", None),
    ],
)
def test_the_earliest_stop_string_counts(stops, pushed, text, found):
    filtered = StopStrings(stops)
    assert "".join(filtered.push(piece) for piece in pushed) + filtered.flush() == text
    assert filtered.found == found


def test_text_that_only_began_like_a_stop_string_comes_out():
    params = SamplingParams(seed=9, max_tokens=24, ignore_eos=True)
    free = hash_engine(tokenizer=Pieces()).generate(["abcabc"], params)[0]
    stop = free.text[-4:] + "!"
    held = hash_engine(tokenizer=Pieces()).generate(["abcabc"], SamplingParams(seed=9, max_tokens=24, ignore_eos=True, stop=stop))[0]
    assert held.text == free.text and held.finish_reason == free.finish_reason


def test_stop_tokens_end_the_output_and_are_not_in_its_text():
    engine = hash_engine(tokenizer=Pieces())
    (free,) = engine.generate(["abc"], SamplingParams(seed=5, max_tokens=20, ignore_eos=True))
    assert free.finish_reason == "length" and len(free.output_ids) == 20
    token = free.output_ids[6]
    cut = free.output_ids.index(token)
    (stopped,) = engine.generate(["abc"], SamplingParams(seed=5, max_tokens=20, ignore_eos=True, stop_token_ids=(token,)))
    assert stopped.output_ids == free.output_ids[: cut + 1] and stopped.finish_reason == "stop"
    assert stopped.text == "".join(PIECES[i] for i in free.output_ids[:cut])


def test_seeds_decide_and_no_seed_differs():
    engine = hash_engine()
    same = engine.generate([[1, 2, 3]] * 3, SamplingParams(seed=8, max_tokens=12))
    free = engine.generate([[1, 2, 3]] * 3, SamplingParams(max_tokens=12))
    assert len({done.output_ids for done in same}) == 1
    assert len({done.output_ids for done in free}) == 3


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "empty"),
        ([1, V], {}, f"holds token {V}"),
        ([-1], {}, "holds token -1"),
        ([1], {"logit_bias": {V: 1.0}}, "logit_bias holds"),
        ([1], {"stop_token_ids": (99,)}, "stop_token_ids holds"),
        ([1], {"stop": "x"}, "need a tokenizer"),
        ("abc", {}, "needs a tokenizer"),
        ("", {}, "empty"),
        ([1] * 60, {"max_tokens": 5}, "context of 65; there are 64"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(prompt, params, says):
    engine = hash_engine()
    with pytest.raises(InputError, match=says):
        engine.generate([[1, 2], prompt], [SamplingParams(max_tokens=3), SamplingParams(**{"max_tokens": 3, **params})])
    assert not engine.has_work
    assert len(engine.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=3))[0].output_ids) == 3


def test_generate_wants_a_list_and_as_many_parameters():
    engine = hash_engine(tokenizer=Pieces())
    with pytest.raises(InputError, match=r"write \[prompt\]"):
        engine.generate("abc")
    with pytest.raises(InputError, match="2 prompts with 1"):
        engine.generate(["a", "b"], [SamplingParams()])
    assert engine.generate([]) == []


def test_a_step_that_raises_ends_its_requests_and_no_others():
    engine = hash_engine(max_sequences=2, tokenizer=Pieces())
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in ("abc", "bca", "cab")]
    engine.step()
    engine.runner.transformer.raises = MemoryError("no room")
    assert engine.step() == requests[:2]
    for request in requests[:2]:
        assert request.finish_reason == "error" and isinstance(request.error, EngineError) and "no room" in str(request.error)
        assert isinstance(request.error.__cause__, MemoryError)
    assert engine.scheduler.allocator.num_used == 0 and not requests[2].finished
    while engine.has_work:
        engine.step()
    assert requests[2].num_outputs == 6
    engine.runner.transformer.raises = RuntimeError("broken")
    with pytest.raises(EngineError, match="broken"):
        engine.generate(["abc", "b"], params)
    assert not engine.has_work and engine.scheduler.allocator.num_used == 0


def test_logits_that_are_not_numbers_end_their_request_only():
    engine = hash_engine()
    params = SamplingParams(temperature=0, max_tokens=4)
    bad, good = engine.add([1, 2], params), engine.add([3, 4], params)
    engine.runner.transformer.fail_at = {0}
    engine.step()
    assert bad.finish_reason == "error" and "position 2" in str(bad.error)
    while engine.has_work:
        engine.step()
    assert good.num_outputs == 4 and engine.scheduler.allocator.num_used == 0


def test_a_failure_of_the_engine_itself_ends_everyone():
    class Broken:
        def propose(self, request):
            raise ZeroDivisionError("in the drafter")

    engine = hash_engine(drafts=2, drafter=Broken())
    requests = [engine.add(prompt, SamplingParams(max_tokens=9)) for prompt in ([1, 2], [1, 3])]
    with pytest.raises(EngineError, match="in the drafter"):
        engine.step()
    assert all(isinstance(request.error, EngineError) for request in requests)
    assert not engine.has_work and engine.scheduler.allocator.num_used == 0


@pytest.mark.parametrize("method", ["allocate", "free", "_take", "_release"])
def test_an_interrupt_leaves_the_engine_usable(monkeypatch, method):
    """Ctrl-C in the forward pass, or between two lines of the allocator: all requests end, all blocks are free, the next request is served."""
    engine = hash_engine(tokenizer=Pieces(), kv_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    right = engine.generate(["abc", "cba"], params)
    engine.runner.transformer.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["abc"], params)
    assert not engine.has_work and engine.scheduler.allocator.num_used == 0
    calls = 0
    original = getattr(engine.scheduler.allocator, method)

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(engine.scheduler.allocator, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["abc", "cba", "bcb", "aab"], params)
    assert not engine.has_work and not engine._texts
    engine.scheduler.allocator.check()
    check_blocks(engine.scheduler)
    again = engine.generate(["abc", "cba"], params)
    assert [done.output_ids for done in again] == [done.output_ids for done in right]


def test_an_interrupted_step_ends_all_requests_also_those_that_wait():
    engine = hash_engine(tokenizer=Pieces(), max_sequences=1)
    requests = [engine.add("abc", SamplingParams(max_tokens=5)) for _ in range(3)]
    engine.runner.transformer.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [request.finish_reason for request in requests] == ["abort"] * 3
    assert not engine.has_work and not engine._texts and engine.scheduler.allocator.num_used == 0


def test_steps_are_reported_with_their_slots():
    seen = []
    engine = hash_engine()
    engine.on_step = lambda step, duration_s: seen.append((step.num_tokens, step.slots.empty_share, duration_s))
    engine.generate([[1] * 10], SamplingParams(temperature=0, max_tokens=3))
    assert [tokens for tokens, _, _ in seen] == [10, 1, 1] and all(duration_s > 0 for *_, duration_s in seen)
    assert [round(share, 3) for _, share, _ in seen] == [round(2 / 12, 3), round(1 / 12, 3), 0]
    assert engine.counters.tokens == 12 and engine.counters.slot_waste == pytest.approx(3 / 36)


def test_continuous_batching_needs_fewer_steps_than_fixed_batches_of_the_same_memory():
    params = [SamplingParams(temperature=0, max_tokens=3 + 25 * (index % 4 == 0), ignore_eos=True) for index in range(24)]
    steps, results = {}, {}
    for policy in ("continuous", "fixed"):
        engine = hash_engine(policy=policy, max_sequences=4, kv_tokens=160)
        results[policy] = outputs(engine.generate(prompts_of(24), params))
        steps[policy] = engine.counters.steps
        assert isinstance(engine.scheduler, Scheduler)
    assert results["continuous"] == results["fixed"]
    assert steps["fixed"] > 2 * steps["continuous"]
