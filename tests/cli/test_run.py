"""`tradespace run` as a user runs it, on a tiny real model: prompts from everywhere, sampling flags, the plan file, the report."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from cli.tiny_model import ROOMY

PROMPT = "why is the sky blue?"


@pytest.fixture
def run(cli, folder):
    return lambda *arguments, stdin=b"": cli("run", folder, *arguments, "--memory", ROOMY, stdin=stdin)


def answers(done) -> list[dict]:
    assert done.code == 0, done.err
    return done.json["completions"]


def test_one_prompt_streams_its_answer_and_nothing_else(run):
    done = run(PROMPT, "-n", 12, "--weights", "fp32")
    assert done.code == 0, done.err
    alone = answers(run(PROMPT, "-n", 12, "--weights", "fp32", "--json"))[0]
    assert done.out == alone["text"] + "\n"
    assert len(alone["output_ids"]) == 12
    assert alone["finish_reason"] == "length"


def test_the_first_line_states_the_budget(cli, folder):
    stated = cli("run", folder, PROMPT, "-n", 1, "--memory", "8GiB").err.splitlines()[0]
    assert stated.startswith("budget: 8.00 GiB of ")
    derived = cli("run", folder, PROMPT, "-n", 1).err.splitlines()[0]
    assert "80% of what is free" in derived
    budget, free = re.findall(r"([\d.]+) GiB", derived)
    assert float(budget) == pytest.approx(0.8 * float(free), rel=0.02)


def test_folder_and_gguf_answer_alike(cli, folder, gguf_file):
    found = [answers(cli("run", model, PROMPT, "-n", 24, "--weights", "fp32", "--memory", ROOMY, "--json"))[0] for model in (folder, gguf_file)]
    assert found[0]["prompt_ids"] == found[1]["prompt_ids"]
    assert found[0]["output_ids"] == found[1]["output_ids"]
    assert found[0]["text"] == found[1]["text"]


def test_tokens_are_those_of_transformers(run):
    import torch

    from cli.tiny_model import oracle

    alone = answers(run(PROMPT, "-n", 24, "--weights", "fp32", "--json"))[0]
    with torch.inference_mode():
        theirs = oracle().generate(torch.tensor([alone["prompt_ids"]]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert theirs[0, len(alone["prompt_ids"]) :].tolist() == alone["output_ids"]


def test_many_prompts_from_everywhere_are_answered_in_order(run, tmp_path):
    (tmp_path / "b.txt").write_text("from a file")
    (tmp_path / "c.txt").write_text("from another")
    texts = ["from an argument", "from standard input", "from a file", "from another"]
    done = run("from an argument", "-", "-f", tmp_path / "b.txt", "-f", tmp_path / "c.txt", "-n", 6, "--json", "--weights", "fp32", stdin=texts[1].encode())
    together = answers(done)
    alone = [answers(run(text, "-n", 6, "--json", "--weights", "fp32"))[0] for text in texts]
    assert [one["prompt_ids"] for one in together] == [one["prompt_ids"] for one in alone]
    assert [one["output_ids"] for one in together] == [one["output_ids"] for one in alone]


def test_many_prompts_are_numbered(run):
    done = run("one", "two", "three", "-n", 2)
    assert done.code == 0
    assert [line for line in done.out.splitlines() if line.startswith("[")] == ["[1] one", "[2] two", "[3] three"]


@pytest.mark.parametrize("arguments", [(), ("-",)], ids=["nothing", "-"])
def test_standard_input_is_a_prompt(run, arguments):
    alone = answers(run("hello", "-n", 1, "--json"))[0]
    assert answers(run(*arguments, "-n", 1, "--json", stdin=b"hello"))[0]["prompt_ids"] == alone["prompt_ids"]


def test_raw_leaves_the_chat_template_out(run):
    from cli.tiny_model import make_tokenizer

    tokenizer = make_tokenizer()
    assert answers(run("hello", "-n", 1, "--json", "--raw"))[0]["prompt_ids"] == tokenizer.encode("hello").ids
    chat = tokenizer.encode("<s><|system|>be brief</s><|user|>hello</s><|assistant|>", add_special_tokens=False).ids
    assert answers(run("hello", "-n", 1, "--json", "--system", "be brief"))[0]["prompt_ids"] == chat


def test_stop_ends_the_answer_before_the_text(run):
    whole = answers(run(PROMPT, "-n", 40, "--json", "--raw"))[0]["text"]
    stop = re.search(r"[ -~]{2}", whole[4:])
    assert stop, "the random model wrote no two printable characters"
    cut = answers(run(PROMPT, "-n", 40, "--json", "--raw", "--stop", stop.group(), "--stop", "no such text"))[0]
    assert cut["text"] == whole[: whole.index(stop.group())]
    assert cut["finish_reason"] == "stop"


def test_a_seed_fixes_the_text_and_another_changes_it(run):
    def sampled(seed):
        return answers(run(PROMPT, "-n", 24, "--json", "--temperature", "1", "--seed", seed))[0]["output_ids"]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_sampling_flags_reach_the_sampler(run):
    greedy = answers(run(PROMPT, "-n", 12, "--json"))[0]["output_ids"]
    for flags in (["--top-k", 1], ["--top-p", "0.000001"], ["--min-p", "1"]):
        assert answers(run(PROMPT, "-n", 12, "--json", "--temperature", "1.5", *flags))[0]["output_ids"] == greedy
    assert answers(run(PROMPT, "-n", 12, "--json", "--repetition-penalty", "50"))[0]["output_ids"] != greedy


def test_report_has_every_line_twice(run):
    done = run(PROMPT, "-n", 8, "--report")
    assert done.code == 0
    for name in ("runtime", "weights", "kv cache", "tokenizer", "staging", "workspace", "peak of the process", "prefill", "decode"):
        row = next(line for line in done.err.splitlines() if line.strip(" │").startswith(name))
        cells = [cell.strip() for cell in row.strip().strip("│").split("│")]
        assert all(cells[:3]), row
    assert max(len(line.rstrip()) for line in done.err.splitlines()) <= 100
    assert "kept" in done.err
    assert "EXCEEDED" not in done.err


def test_json_has_the_same_report_and_standard_output_holds_nothing_else(run):
    done = run(PROMPT, "-n", 8, "--json")
    assert done.err == ""
    lines = {line["name"]: line for line in done.json["report"]["lines"]}
    assert lines["decode"]["measured"] > 0
    assert lines["prefill"]["measured"] > 0
    assert lines["peak of the process"]["measured"] <= 8 * 2**30


@pytest.fixture
def saved(cli, folder, tmp_path):
    path = tmp_path / "plan.yaml"
    arguments = ("--memory", ROOMY, "--context", 256, "--runnable", "--weights", "fp32", "--attention", "chunked", "--kv-layout", "paged", "--save", path)
    assert cli("plan", folder, *arguments).code == 0
    return path


def test_a_saved_plan_is_obeyed(cli, folder, saved):
    done = cli("run", folder, PROMPT, "-n", 4, "--plan", saved, "--json")
    assert done.code == 0, done.err
    facts = done.json["report"]["facts"]
    assert facts["budget"].startswith("8.00 GiB")
    assert all(word in facts["plan"] for word in ("fp32", "paged", "chunked"))
    cli("run", folder, "word " * 300, "--raw", "--plan", saved).failed(2, "context", "256")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wieghts": {}}, ("wieghts", "weights")),
        ({"max_context": "many"}, ("max_context", "many")),
        ({"max_context": 0}, ("max_context", "0")),
        ({"max_context": True}, ("max_context",)),
        ({"kv": {"store": "int5"}}, ("int5", "int8")),
        ({"kv": {"retain": {"kind": "some"}}}, ("some",)),
        ({"kv": []}, ("kv",)),
        ({"weights": {"default": "int5"}}, ("int5", "int4")),
        ({"weights": {"exceptions": {"no-such-role": "fp32"}}}, ("no-such-role",)),
        ({"weights": {"exceptions": {"embed": 7}}}, ("7",)),
        ({"attention": "flesh"}, ("flesh", "sdpa")),
        ({"linear": "fast"}, ("fast", "torch")),
        ({"device": "rtx-4090"}, ("rtx-4090", "cpu")),
        ({"device": "banana"}, ("banana", "cpu")),
        ({"kv_tokens": 17}, ("kv_tokens", "17")),
        ({"kv": {"block_size": 0}}, ("block size 0",)),
        ({"step_tokens": -4}, ("step_tokens",)),
        ({"max_context": 100_000}, ("100000", "8192")),
    ],
)
def test_a_plan_that_makes_no_sense_is_named(cli, folder, saved, changes, words):
    values = yaml.safe_load(saved.read_text())
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and isinstance(values.get(key), dict) else value
    saved.write_text(yaml.safe_dump(values))
    cli("run", folder, PROMPT, "-n", 1, "--plan", saved).failed(2, *words)


@pytest.mark.parametrize("text", [b"", b"[1, 2]", b"just words", b"a: [", b"\xff\xfe\x00", b"a: &x [*x]", b"? {a: b}\n: c", b"!!python/object:os.system {}"])
def test_a_plan_file_that_is_no_plan(cli, folder, tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_bytes(text)
    cli("run", folder, PROMPT, "-n", 1, "--plan", path).failed(2)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kv": {"store": "x-int8", "values": "int4"}}, "keys and values alike"),
        ({"placement": {"streamed_layers": 1}}, "streamed"),
        ({"tensor_parallel": 2}, "2 devices"),
        ({"speculation": 2}, "speculation"),
    ],
)
def test_a_plan_that_cannot_run_yet_is_refused(cli, folder, saved, changes, word):
    values = yaml.safe_load(saved.read_text())
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    saved.write_text(yaml.safe_dump(values))
    cli("run", folder, PROMPT, "-n", 1, "--plan", saved).failed(2, "cannot run yet", word, "--runnable")


def test_a_plan_with_a_kernel_for_gpus_is_refused_here(cli, folder, saved, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    saved.write_text(yaml.safe_dump(yaml.safe_load(saved.read_text()) | {"attention": "flash"}))
    cli("run", folder, PROMPT, "-n", 1, "--plan", saved).failed(2, "flash", "CUDA", "sdpa")


@pytest.mark.parametrize("flag", [("--context", 64), ("--weights", "bf16"), ("--attention", "sdpa")])
def test_a_flag_that_contradicts_the_plan_is_refused(cli, folder, saved, flag):
    cli("run", folder, PROMPT, "-n", 1, "--plan", saved, *flag).failed(2, flag[0], "--plan")


def test_a_plan_for_another_budget_is_refused_with_need_and_have(cli, folder, saved):
    done = cli("run", folder, PROMPT, "-n", 1, "--plan", saved, "--memory", "100MiB", "--json")
    done.failed(3, "100 MiB", "--memory")
    assert json.loads(done.out)["have_bytes"] == 100 * 2**20


def test_generation_config_is_the_default_and_flags_win(cli, broken):
    model = broken()
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 5.0, "top_k": 0, "eos_token_id": 2}))
    two = [answers(cli("run", model, PROMPT, "-n", 12, "--seed", seed, "--memory", ROOMY, "--json"))[0]["output_ids"] for seed in (1, 2)]
    assert two[0] != two[1]
    two = [answers(cli("run", model, PROMPT, "-n", 12, "--temperature", 0, "--seed", seed, "--memory", ROOMY, "--json"))[0]["output_ids"] for seed in (1, 2)]
    assert two[0] == two[1]


def test_several_answers_to_one_prompt(run):
    """Numbered on a terminal; in JSON the first with its siblings, and the report counts what was found."""
    done = run("one", "-n", 2, "--n", 3)
    assert done.code == 0
    assert [line for line in done.out.splitlines() if line.startswith("[")] == ["[1.1] one", "[1.2] one", "[1.3] one"]
    found = run("a longer prompt than one block holds", "-n", 4, "--n", 3, "--seed", 1, "--temperature", 1, "--json", "--prefix-sharing")
    (first,) = answers(found)
    samples = [first, *first["siblings"]]
    assert [sample["sample"] for sample in samples] == [0, 1, 2] and len({tuple(sample["output_ids"]) for sample in samples}) > 1
    facts = json.loads(found.out)["report"]["facts"]
    assert facts["prefix_cache_hits"] == f"{2 * (len(first['prompt_ids']) - 1)} tokens"
    assert facts["prefix_cache_queries"] == f"{3 * len(first['prompt_ids'])} tokens"
    assert run("one", "--n", 0).code == 2
