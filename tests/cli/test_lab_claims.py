"""`tradespace lab claims`, and an attention pattern on plan, run and eval."""

from __future__ import annotations

import pytest


def test_one_claim_as_json(cli):
    done = cli("lab", "claims", "A9", "--json")
    assert done.code == 0
    (row,) = done.json
    assert (row["id"], row["document"], row["verdict"]) == (9, "A", "refuted")
    assert "10.7 GB" in row["figure"] and row["reading"] and row["decided_by"] == "calculation"


def test_all_claims_as_a_table(cli):
    done = cli("lab", "claims")
    assert done.code == 0
    assert "124 claims" in done.out
    assert max(map(len, done.out.splitlines())) <= 100


def test_no_such_claim(cli):
    cli("lab", "claims", "Z9").failed(2, "Z9", "lab claims")


def test_a_plan_with_an_imposed_pattern_says_so_and_knows_no_quality(cli):
    done = cli("plan", "llama-2-7b", "--memory", "40GB", "--device", "a100-40gb", "--attention-pattern", "selected:share=0.25", "--json")
    assert done.code == 0
    best = done.json["best"]
    assert best["plan"]["pattern"] == "selected:block=64,share=0.25"
    assert "imposed" in best["describe"]
    assert best["quality_nats"] is None and "selected" in best["quality_source"]


@pytest.mark.parametrize(("pattern", "word"), [("diagonal", "sliding:W"), ("sliding:none", "sliding:1024"), ("documents:5", "packed text")])
def test_a_pattern_that_makes_no_sense(cli, pattern, word):
    cli("plan", "llama-2-7b", "--memory", "40GB", "--device", "a100-40gb", "--attention-pattern", pattern).failed(2, word)


@pytest.mark.parametrize("pattern", ["sliding:4", "block-sparse:block=16,local=1,leading=1,random=0", "selected:block=16,share=0.5", "prefix:3"])
def test_run_obeys_an_imposed_pattern(cli, folder, pattern):
    done = cli("run", folder, "Hello there", "--raw", "--max-tokens", "4", "--temp", "0", "--attention-pattern", pattern, "--json")
    assert done.code == 0, done.err
    assert len(done.json["completions"][0]["output_ids"]) >= 1
    assert "imposed" in str(done.json["report"])


def test_eval_refuses_what_shows_the_future(cli, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 200, encoding="utf-8")
    cli("eval", folder, "--text", text, "--attention-pattern", "prefix:8").failed(2, "future")
