"""The library as a caller uses it: `ts.open` on a tiny real model, its answers, its streams, its report, and what it says after `close`."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import tradespace as ts
from cli.tiny_model import ROOMY, make_home, make_tokenizer, oracle, save_folder
from tradespace.choosing import check_device_plan
from tradespace.defaults import Defaults
from tradespace.llm import LLM
from tradespace.loading.resolve import resolve
from tradespace.spec.device_zoo import find_device
from tradespace.spec.plan import Plan
from tradespace.spec.zoo import find_model

PROMPTS = ["why is the sky blue?", "a", "the plan is made. " * 12, "0123456789 und Größe ✓"]
GREEDY = ts.SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRADESPACE_HOME", str(make_home(tmp_path_factory.mktemp("home"))))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(home: None, folder: Path) -> Iterator[LLM]:
    with ts.open(folder, memory=ROOMY, context=512, concurrency=4, weights="fp32") as opened:
        yield opened


def free_blocks(llm: LLM) -> int:
    return llm.engine.scheduler.allocator.num_free


# --- answers


def test_greedy_answers_are_those_of_transformers(llm):
    import torch

    for done in llm.generate(PROMPTS, GREEDY):
        with torch.inference_mode():
            theirs = oracle().generate(torch.tensor([done.prompt_ids]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert theirs[0, len(done.prompt_ids) :].tolist() == list(done.output_ids)
        assert done.finish_reason == "length"


def test_a_batch_answers_as_one_by_one(llm):
    together = llm.generate(PROMPTS, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    assert [done.output_ids for done in together] == [done.output_ids for done in alone]
    assert [done.text for done in together] == [done.text for done in alone]


def test_more_prompts_than_sequences_are_all_answered(llm):
    prompts = [f"number {index}" for index in range(3 * llm.plan.max_sequences)]
    done = llm.generate(prompts, GREEDY)
    assert [one.prompt_ids for one in done] == [tuple(make_tokenizer().encode(prompt).ids) for prompt in prompts]
    assert all(len(one.output_ids) == 16 for one in done)


def test_each_prompt_may_have_its_own_parameters(llm):
    each = [dataclasses.replace(GREEDY, max_tokens=count) for count in (1, 5, 9, 13)]
    assert [len(done.output_ids) for done in llm.generate(PROMPTS, each)] == [1, 5, 9, 13]
    with pytest.raises(ts.InputError, match="4 prompts with 1"):
        llm.generate(PROMPTS, each[:1])


def test_a_stream_is_the_answer_in_pieces(llm):
    whole = llm.generate(PROMPTS[0], GREEDY)[0].text
    pieces = list(llm.stream(PROMPTS[0], GREEDY))
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_token_ids_are_a_prompt(llm):
    ids = make_tokenizer().encode(PROMPTS[0]).ids
    assert llm.generate([ids], GREEDY)[0].output_ids == llm.generate(PROMPTS[0], GREEDY)[0].output_ids
    with pytest.raises(ts.InputError, match="9999"):
        llm.generate([[1, 9999]], GREEDY)


def test_chat_goes_through_the_template(llm):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    done = llm.chat(messages, GREEDY)
    expected = make_tokenizer().encode("<s><|system|>be brief</s><|user|>hello</s><|assistant|>", add_special_tokens=False).ids
    assert list(done.prompt_ids) == expected
    assert "".join(llm.stream_chat(messages, GREEDY)) == done.text
    assert llm.render("hello", system="be brief") == expected


def test_an_empty_prompt_among_others_leaves_nothing_behind(llm):
    before = free_blocks(llm)
    with pytest.raises(ts.InputError, match="empty"):
        llm.generate(["fine", ""], GREEDY)
    assert free_blocks(llm) == before
    assert not llm.engine.has_work


def test_a_prompt_over_the_context_says_need_have_and_remedy(llm):
    with pytest.raises(ts.InputError, match=r"need a context of 6\d\d; there are 512. Shorten"):
        llm.generate("word " * 120, dataclasses.replace(GREEDY, max_tokens=16))


# --- streams that are left


@pytest.mark.parametrize("how", ["break", "close", "drop", "error"])
def test_leaving_a_stream_frees_its_blocks(llm, how):
    before = free_blocks(llm)
    stream = llm.stream(PROMPTS[2], dataclasses.replace(GREEDY, max_tokens=200))
    next(stream)
    assert free_blocks(llm) < before
    if how == "close":
        stream.close()
    elif how == "error":
        with pytest.raises(ZeroDivisionError):
            stream.throw(ZeroDivisionError)
    del stream
    assert free_blocks(llm) == before
    assert not llm.engine.has_work


def test_a_stream_that_is_never_read_holds_no_request(llm):
    before = free_blocks(llm)
    stream = llm.stream(PROMPTS[2], GREEDY)
    del stream
    assert not llm.engine.has_work
    assert free_blocks(llm) == before


def test_two_streams_at_once(llm):
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    texts = ["", ""]
    for left, right in zip(first, second, strict=False):
        texts[0] += left
        texts[1] += right
    texts[0] += "".join(first)
    texts[1] += "".join(second)
    whole = [done.text for done in llm.generate(PROMPTS[:2], GREEDY)]
    # zip may have taken a piece of the first before it found the second at its end
    assert whole[0].startswith(texts[0][:4])
    assert texts[1] == whole[1]


# --- the report


def test_every_line_of_the_ledger_is_predicted_and_measured(llm):
    llm.generate(PROMPTS, GREEDY)
    report = llm.report()
    names = [line.name for line in report.lines]
    assert names[:2] == ["runtime", "weights"] or {"runtime", "weights", "kv cache", "workspace", "staging", "tokenizer"} <= set(names)
    for line in report.lines:
        assert line.measured is not None, line.name
        if line.name != "peak resident size":
            assert line.predicted.value, line.name
            assert line.predicted.source, line.name
    for name in ("weights", "kv cache"):
        assert report.line(name).measured == report.line(name).predicted.value, f"{name}: what is allocated is what was planned, to the byte"
    assert report.line("decode").measured > 0
    assert report.line("prefill").measured > 0
    with pytest.raises(KeyError, match="there are: "):
        report.line("no such line")


def test_the_report_as_text_and_as_values(llm):
    llm.generate(PROMPTS[0], GREEDY)
    report = llm.report()
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    for line in report.lines:
        assert line.name in text
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["lines"][0]["name"] == report.lines[0].name


def test_the_measured_peak_is_within_the_budget(llm):
    llm.generate(PROMPTS * 4, GREEDY)
    peak = llm.report().line("peak of the process")
    assert 0 < peak.measured <= llm.plan.memory_bytes
    assert dict(llm.report().facts)["budget"].endswith("(kept)")


def test_a_prefix_is_found_by_the_next_request_and_reported(home, folder):
    """Asked for: paged, and counted; a fixed batch has none; a plan that shares does not go with fixed batches."""
    with ts.open(folder, memory=ROOMY, context=256, concurrency=4, weights="fp32", prefix_sharing=True) as opened:
        assert opened.plan.kv.prefix_sharing and opened.plan.kv.layout == "paged"
        first, second = (opened.generate([PROMPTS[2]], GREEDY)[0] for _ in range(2))
        assert first.num_cached == 0 and second.num_cached >= 16 and first.output_ids == second.output_ids
        facts = dict(opened.report().facts)
        assert facts["prefix_cache_hits"] == f"{second.num_cached} tokens" and "prefix_cache_queries" in facts
        four = opened.generate([PROMPTS[0]], dataclasses.replace(GREEDY, temperature=1.0, seed=1, n=4))[0].samples
        assert len({sample.output_ids for sample in four}) == 4
        plan = opened.plan
    with ts.open(folder, memory=ROOMY, context=64, scheduling="fixed") as opened:
        assert not opened.plan.kv.prefix_sharing
    with pytest.raises(ts.InputError, match="schedule continuously"):
        ts.open(folder, plan=plan, scheduling="fixed")
    with pytest.raises(ts.InputError, match="Leave --prefix-sharing away"):
        ts.open(folder, plan=plan, prefix_sharing=True)


def test_decode_and_prefill_are_told_apart(llm):
    llm.engine.forget_prefixes()
    llm.generate(PROMPTS[2], GREEDY)
    assert llm.speeds.decode_tokens == 15
    assert llm.speeds.prefill_tokens == len(make_tokenizer().encode(PROMPTS[2]).ids)


# --- opening and closing


def test_after_close_everything_is_an_input_error(home, folder):
    with ts.open(folder, memory=ROOMY, context=64) as opened:
        stream = opened.stream("hello", GREEDY)
        next(stream)
    for use in (
        lambda: opened.generate("hello"),
        lambda: list(opened.stream("hello")),
        lambda: opened.chat([{"role": "user", "content": "hello"}]),
        lambda: opened.report(),
        lambda: opened.plan,
        lambda: opened.render("hello"),
        lambda: opened.weight_bytes(),
    ):
        with pytest.raises(ts.InputError, match="closed"):
            use()
    opened.close()  # twice is as good as once
    assert len(list(stream)) <= 8, "a stream that outlives its model ends; it does not go on"


def test_a_budget_that_cannot_be_met_carries_need_and_have(home, folder):
    with pytest.raises(ts.BudgetError, match="needs at least") as caught:
        ts.open(folder, memory="1MiB")
    assert caught.value.have_bytes == 2**20
    assert caught.value.need_bytes and caught.value.need_bytes > 2**27


def test_a_plan_object_is_obeyed(home, folder):
    best = ts.plan(folder, memory=ROOMY, context=128, concurrency=2, runnable_only=True, pins={"weights": "fp32", "layout": "paged"}).best
    assert best is not None
    with ts.open(folder, plan=best.plan) as opened:
        assert opened.plan.memory_bytes == best.plan.memory_bytes
        assert dataclasses.replace(opened.plan, threads=best.plan.threads) == best.plan
    with pytest.raises(ts.UnsupportedError, match="cannot run yet: speculation"):
        ts.open(folder, plan=dataclasses.replace(best.plan, speculation=2))
    with pytest.raises(ts.InputError, match="exceeds the 8192"):
        ts.open(folder, plan=dataclasses.replace(best.plan, max_context=16384))
    with pytest.raises(ts.InputError, match="obeyed to the letter"):
        ts.open(folder, plan=best.plan, context=64)


def test_what_runs_is_not_confused_with_what_fits(home, folder):
    with pytest.raises(ts.InputError, match="flash is a kernel for CUDA devices"):
        ts.open(folder, memory=ROOMY, attention="flash")


def test_say_gets_the_budget_first(home, folder):
    said: list[str] = []
    with ts.open(folder, memory="8GiB", context=64, say=said.append):
        pass
    assert said[0].startswith("budget: 8.00 GiB of ")
    assert [line for line in said if not line.startswith("compiling")][1].startswith("plan: ")


# --- the model's own sampling


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, Defaults()),
        ({"temperature": 0.6, "top_k": 20}, Defaults()),  # do_sample is absent: greedy, as transformers reads it
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}, Defaults(temperature=0.6, top_k=20, top_p=0.9)),
        ({"do_sample": True}, Defaults(temperature=1.0)),
        ({"do_sample": False, "repetition_penalty": 1.3, "top_p": 0.5}, Defaults(repetition_penalty=1.3)),
        ({"do_sample": True, "temperature": None, "min_p": 0.1, "top_k": None}, Defaults(temperature=1.0, min_p=0.1)),
    ],
)
def test_defaults_of_generation_config(folder, stated, expected):
    files = dataclasses.replace(resolve(str(folder)), generation_config=stated)
    assert Defaults.of(files) == expected


def test_callers_win_over_defaults(llm):
    llm._defaults = Defaults(temperature=0.7, top_k=11)
    try:
        assert llm.sampling().temperature == 0.7
        assert llm.sampling(temperature=0.0, top_k=None).top_k == 11
        assert llm.sampling(temperature=0.0).greedy
        with pytest.raises((ts.InputError, TypeError), match="heat"):
            llm.sampling(heat=2)
    finally:
        llm._defaults = Defaults()


def test_defaults_of_gguf_metadata(tmp_path):
    from cli.tiny_model import gguf_metadata
    from tradespace.loading.gguf import write_gguf

    path = tmp_path / "sampling.gguf"
    write_gguf(path, gguf_metadata() | {"general.sampling.temp": 0.5, "general.sampling.top_k": 30}, [])
    assert Defaults.of(resolve(str(path))) == Defaults(temperature=0.5, top_k=30)


# --- the public names


@pytest.mark.parametrize("name", ts.__all__)
def test_public_names_are_there_and_documented(name):
    value = getattr(ts, name)
    assert inspect.getdoc(value), name
    if inspect.isclass(value):
        for member, method in vars(value).items():
            if inspect.isfunction(method) and not member.startswith("_"):
                assert inspect.signature(method).return_annotation is not inspect.Signature.empty, f"{name}.{member}"


def test_no_other_name_is_public():
    assert set(ts.__all__) <= set(dir(ts))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ts.nothing  # type: ignore[attr-defined]


def test_the_examples_of_the_documentation_hold():
    found = doctest.testmod(importlib.import_module("tradespace.api"))
    assert found.attempted >= 3
    assert found.failed == 0


def test_a_plan_for_a_card_is_obeyed_to_the_letter_or_refused():
    """What a CUDA device asks of a plan before anything is loaded."""
    spec, card = find_model("llama-3.2-1b"), find_device("h100-80gb")
    frontier = ts.plan("llama-3.2-1b", memory="16GiB", device="h100-80gb", context=1024, runnable_only=True, pins={"linear": "cuda"})
    assert frontier.best is not None
    plan = frontier.best.plan
    check_device_plan(plan, spec, {"context": None, "weights": None}, card)
    with pytest.raises(ts.InputError, match="states its own context, weights"):
        check_device_plan(plan, spec, {"context": 64, "weights": "int8"}, card)
    with pytest.raises(ts.InputError, match="is for a100-80gb, and the card is h100-80gb"):
        check_device_plan(dataclasses.replace(plan, device="a100-80gb"), spec, {}, card)
    with pytest.raises(ts.InputError, match="max_context"):
        check_device_plan(dataclasses.replace(plan, max_context=2**20), spec, {}, card)
    with pytest.raises(ts.UnsupportedError, match="--device cpu"):
        check_device_plan(Plan(model="llama-3.2-1b"), spec, {}, card)
