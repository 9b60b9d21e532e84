"""Beam search: transformers' outputs on random models, every output where the beams are wide enough to hold all, and blocks that are shared and given back."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fakes import Pieces, hash_engine
from engine.oracle import check_blocks
from tradespace.engine.beam import BeamParams, BeamSearch
from tradespace.engine.engine import Engine
from tradespace.engine.request import SamplingParams
from tradespace.engine.runner import Runner
from tradespace.engine.sampler import Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.errors import InputError
from tradespace.kv.cache import KVCache
from tradespace.loading.resolve import resolve
from tradespace.loading.weights import load_weights
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.kv import KVPlan
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan

torch.set_num_threads(1)
PROMPT = (3, 14, 15, 9, 2, 6)
SHARED = {"prefix_sharing": True, "eos_ids": (0,)}


# --- beside transformers


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random Llama of 60 tokens in transformers, and the same weights in an engine over a paged cache."""
    pytest.importorskip("transformers")
    from loading.gguf_models import source_of
    from loading.quantized_models import build_fp32, tiny_config, tiny_model

    theirs = tiny_model(tiny_config("llama", width=128, hidden=256, vocab=60), seed=5)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(6)  # so that some tokens are clearly likelier than others, and beams end at different lengths
    folder = tmp_path_factory.mktemp("beams")
    theirs.save_pretrained(folder)
    files = resolve(str(folder), download=False)
    assert files.config is not None
    spec = model_spec_from_config(files.config, "tiny")
    model = build_fp32(spec, WeightPlan(default="fp32"))
    load_weights(model, source_of(files), spec, fill=fill_rtn, staging_bytes=1 << 20)

    def engine(eos_ids: tuple[int, ...], **changes) -> Engine:
        kv = KVPlan(layout="paged", block_size=4, store="fp32", prefix_sharing=True)
        plan = Plan(model="tiny", kv=kv, **{"max_sequences": 8, "max_context": 64, "step_tokens": 32, "kv_tokens": 8 * 64, **changes})
        scheduler = Scheduler.from_plan(plan)
        cache = KVCache(spec, kv, num_blocks=plan.num_blocks, block_size=scheduler.block_size, dtype=torch.float32)
        return Engine(Runner(model, cache, plan), scheduler, Sampler(), eos_ids=eos_ids)

    return theirs, engine


SETTINGS = [
    {"num_beams": 1},
    {"num_beams": 2},
    {"num_beams": 4},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 4, "early_stopping": "never"},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 5, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 6, "length_penalty": 1.5, "early_stopping": True},
]


@pytest.mark.parametrize("eos_ids", [(), (7,), (7, 21, 33)], ids=["no end", "one end", "three ends"])
@pytest.mark.parametrize("wanted", SETTINGS, ids=str)
def test_outputs_are_those_of_transformers(pair, wanted, eos_ids):
    theirs, engine_of = pair
    engine = engine_of(eos_ids)
    for start in range(4):
        prompt = [(start * 17 + 5 * i + i * i) % 60 for i in range(3 + 2 * start)]
        settings_ = {"early_stopping": False, "length_penalty": 1.0, **wanted}
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                num_return_sequences=wanted["num_beams"],
                eos_token_id=list(eos_ids) or None,
                pad_token_id=59,
                output_scores=True,
                return_dict_in_generate=True,
                **settings_,
            )
        found = engine.beam_search(prompt, BeamParams(max_tokens=12, **wanted))
        assert len(found) == wanted["num_beams"] and engine.scheduler.allocator.num_used == 0
        scores = expected.sequences_scores.tolist() if wanted["num_beams"] > 1 else [None]
        for output, ids, score in zip(found, expected.sequences.tolist(), scores, strict=True):
            new = ids[len(prompt) :]
            length = next((at + 1 for at, token in enumerate(new) if token in eos_ids), len(new))
            assert list(output.output_ids) == new[:length]
            assert set(new[length:]) <= {59}, "what follows is padding"
            assert score is None or output.score == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("changes", [{"max_sequences": 2}, {"kv_tokens": 64}, {"step_tokens": 3}], ids=str)
def test_too_little_room_for_all_beams_changes_nothing(pair, changes):
    _, engine_of = pair
    params = BeamParams(num_beams=5, max_tokens=14)
    roomy, tight = engine_of((7,)), engine_of((7,), **changes)
    for prompt in ([1, 2, 3], [50, 40, 30, 20, 10, 5, 4]):
        assert [output.output_ids for output in tight.beam_search(prompt, params)] == [output.output_ids for output in roomy.beam_search(prompt, params)]
        assert tight.scheduler.allocator.num_used == 0
    check_blocks(tight.scheduler)


# --- on the hash machine


def test_the_widest_search_finds_the_best_of_all():
    """Three tokens over an alphabet narrowed to four by the test: every output enumerated."""
    draw = torch.Generator().manual_seed(2)
    logprobs = {prefix: torch.log_softmax(3 * torch.randn(4, generator=draw), 0).tolist() for n in range(3) for prefix in product(range(4), repeat=n)}
    search = BeamSearch(BeamParams(num_beams=16, max_tokens=3), frozenset())
    going = search.take([list(enumerate(logprobs[()]))])
    while going:
        going = search.take([list(enumerate(logprobs[beam.tokens])) for beam in search.beams])
    every = {tokens: sum(logprobs[tokens[:at]][token] for at, token in enumerate(tokens)) for tokens in product(range(4), repeat=3)}
    best = sorted(every, key=lambda tokens: -every[tokens])[:16]
    assert [beam.tokens for _, beam, _ in search.ended] == best


def test_beams_share_what_they_have_in_common():
    engine = hash_engine(**SHARED)
    most = 0

    def watch(step, seconds):
        nonlocal most
        check_blocks(engine.scheduler)
        most = max(most, engine.scheduler.allocator.num_used)

    engine.on_step = watch
    prompt = tuple(i % 31 for i in range(40))  # ten blocks of four
    found = engine.beam_search(prompt, BeamParams(num_beams=6, max_tokens=8, ignore_eos=True))
    assert len({output.output_ids for output in found}) == 6 and engine.scheduler.allocator.num_used == 0
    assert most <= 10 + 6 * 3, "the prompt's blocks are there once, and each beam's own"
    assert engine.counters.preemptions == 0
    assert engine.counters.tokens <= 40 + 6 * 8, "nothing is computed twice"


def test_others_get_on_beside_a_search():
    engine = hash_engine(**SHARED)
    request = engine.add(PROMPT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    alone = hash_engine(**SHARED).generate([PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0]
    found = engine.beam_search(PROMPT[:4], BeamParams(num_beams=3, max_tokens=8))
    assert request.finished and tuple(request.output_ids) == alone.output_ids
    assert [output.output_ids for output in found] == [
        o.output_ids for o in hash_engine(**SHARED).beam_search(PROMPT[:4], BeamParams(num_beams=3, max_tokens=8))
    ]


def test_text_and_ends():
    engine = hash_engine(tokenizer=Pieces(), prefix_sharing=True)
    found = engine.beam_search("ab", BeamParams(num_beams=5, max_tokens=10, num_return=3))
    assert len(found) == 3 and [output.score for output in found] == sorted((output.score for output in found), reverse=True)
    for output in found:
        spoken = output.output_ids[:-1] if output.finish_reason == "stop" else output.output_ids
        assert output.text == "".join(map(Pieces().push, spoken)) and (output.finish_reason == "stop") == (output.output_ids[-1] == 0)
        assert output.score == pytest.approx(output.logprob / len(output.output_ids))


@settings(max_examples=30, deadline=None)
@given(
    num_beams=st.integers(1, 8),
    max_tokens=st.integers(1, 12),
    early=st.sampled_from([True, False, "never"]),
    penalty=st.floats(-1, 2),
    sequences=st.integers(1, 8),
)
def test_the_room_that_there_is_decides_nothing(num_beams, max_tokens, early, penalty, sequences):
    params = BeamParams(num_beams=num_beams, max_tokens=max_tokens, early_stopping=early, length_penalty=penalty)
    found = []
    for changes in ({}, {"max_sequences": sequences}, {"prefix_sharing": False}, {"kv_tokens": 64}):
        engine = hash_engine(**{**SHARED, **changes})
        found.append([output.output_ids for output in engine.beam_search(PROMPT, params)])
        assert engine.scheduler.allocator.num_used == 0 and not engine.has_work
        check_blocks(engine.scheduler)
    assert all(outputs == found[0] for outputs in found)


def test_a_failing_step_ends_the_search_and_leaves_nothing_behind():
    engine = hash_engine(**SHARED)
    engine.runner.transformer.raises = RuntimeError("boom")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Exception, match="boom"):
        engine.beam_search(PROMPT, BeamParams(num_beams=3, max_tokens=5))
    assert engine.scheduler.allocator.num_used == 0 and not engine.has_work
    assert len(engine.beam_search(PROMPT, BeamParams(num_beams=3, max_tokens=5))) == 3


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; it must lie between 1 and 19"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"early_stopping": "soon"}, "choose True, False or 'never'"),
        ({"num_beams": 2, "num_return": 3}, "of 2 beams at least 1 and at most 2"),
    ],
)
def test_what_cannot_be_searched(wanted, message):
    with pytest.raises(InputError, match=message):
        BeamParams(**wanted)


def test_what_the_engine_cannot_search():
    engine = hash_engine(**SHARED)
    with pytest.raises(InputError, match="19 beams with 2 stop tokens need 21 log-probabilities; there are 20"):
        engine.beam_search(PROMPT, BeamParams(num_beams=19, stop_token_ids=(1,)))
    with pytest.raises(InputError, match="the prompt holds token 99"):
        engine.beam_search((99,), BeamParams())
    with pytest.raises(InputError, match="need a context of"):
        engine.beam_search(PROMPT, BeamParams(max_tokens=60))
