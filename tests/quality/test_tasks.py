"""Tasks are read, asked and counted as lm-eval does it: requests by hand here, accuracies beside lm-eval itself in tests/oracles/test_lm_eval.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cli.tiny_model import make_tokenizer
from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.tokenizer import Tokenizer
from tradespace.quality.tasks import TASKS, Example, describe, encode_pair, passages_of, read_examples, run_task

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"
CHOICE = {"query": "Question: why?", "choices": ["so", "because"], "gold": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer(), bos_id=1, eos_ids=frozenset({2}), special_tokens={}, chat_template=None)


def write(folder: Path, name: str, *lines: object) -> Path:
    (folder / f"{name}.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return folder


def test_requests_by_hand(tmp_path):
    write(tmp_path, "arc_easy", CHOICE)
    (found,) = read_examples(TASKS["arc_easy"], tmp_path)
    assert found == Example((("Question: why?\nAnswer:", " so"), ("Question: why?\nAnswer:", " because")), (2, 7), 1)
    write(tmp_path, "piqa", CHOICE | {"query": "Question: how?\n"})
    (found,) = read_examples(TASKS["piqa"], tmp_path)
    assert found.requests[0] == ("Question: how?\nAnswer:", " so")
    write(tmp_path, "winogrande", {"context_options": ["so Ann", "so Bob"], "continuation": "left.", "gold": 0})
    (found,) = read_examples(TASKS["winogrande"], tmp_path)
    assert found.requests == (("so Ann", " left."), ("so Bob", " left."))
    write(tmp_path, "lambada_openai", {"context": "she saw the", "continuation": "sea"}, {"context": "a", "continuation": "b"})
    found = read_examples(TASKS["lambada_openai"], tmp_path, limit=1)
    assert found == [Example((("she saw the", " sea"),), (3,), 0)]


@pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation data (tasks) is not beside this checkout")
@pytest.mark.parametrize(("task", "count"), [("arc_easy", 2376), ("piqa", 1838), ("winogrande", 1267), ("lambada_openai", 5153)])
def test_the_whole_data_can_be_read(task, count):
    assert len(read_examples(TASKS[task], DATA)) == count


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ([1], "JSON object"),
        ({"query": "q", "choices": ["a", "b"]}, "gold"),
        (CHOICE | {"gold": True}, "gold"),
        (CHOICE | {"gold": 2}, "none of 2"),
        (CHOICE | {"gold": -1}, "none of 2"),
        (CHOICE | {"query": ""}, "empty"),
        (CHOICE | {"choices": ["a"]}, "two texts"),
        (CHOICE | {"choices": ["a", 1]}, "two texts"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    write(tmp_path, "arc_easy", CHOICE, line)
    with pytest.raises(CorruptFileError, match="line 2") as caught:
        read_examples(TASKS["arc_easy"], tmp_path)
    assert words in str(caught.value)


def test_missing_and_empty_files_are_said(tmp_path):
    with pytest.raises(InputError, match="--task-data"):
        read_examples(TASKS["piqa"], tmp_path)
    write(tmp_path, "piqa")
    with pytest.raises(InputError, match="empty"):
        read_examples(TASKS["piqa"], tmp_path)
    (tmp_path / "piqa.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(CorruptFileError, match="UTF-8"):
        read_examples(TASKS["piqa"], tmp_path)


def test_a_pair_is_encoded_as_one_text(tokenizer):
    head, tail = encode_pair(tokenizer, "the quick brown", " fox")
    assert [*head, *tail] == tokenizer.encode("the quick brown fox")
    assert head == tokenizer.encode("the quick brown") and tokenizer.decode(tail) == " fox"
    # a space at the end of the context is the continuation's
    assert encode_pair(tokenizer, "the quick brown ", "fox") == (head, tail)


def test_a_long_context_loses_its_start(tokenizer):
    example = Example((("the lazy dog " * 20, "jumps"),), (5,), 0)
    (whole,), cut = passages_of(tokenizer, example, 4096)
    assert not cut and len(whole.ids) > 30
    (short,), cut = passages_of(tokenizer, example, 10)
    assert cut and list(short.ids) == list(whole.ids[-11:]) and len(short.ids) - short.first == len(whole.ids) - whole.first
    with pytest.raises(InputError, match="does not fit a context of 1"):
        passages_of(tokenizer, Example((("a", " quick brown fox"),), (1,), 0), 1)


def test_choices_share_what_they_begin_with(tokenizer):
    passages, _ = passages_of(tokenizer, Example((("the quick", " fox"), ("the quick", " dog")), (3, 3), 0), 64)
    assert [passage.shared for passage in passages] == [0, len(tokenizer.encode("the quick"))]


class Scripted:
    """A model whose scores are known beforehand."""

    def __init__(self, scores: list[tuple[float, bool]]):
        self._scores = iter(scores)

    def scores(self, passages):
        return iter([next(self._scores) for _ in passages])


def test_accuracies_by_hand(tokenizer):
    """Three questions with answers of 1 and 4 characters, the second right: the likeliest, and the likeliest a character."""
    examples = [Example((("why", " a"), ("why", " blue")), (1, 4), 1)] * 3
    forward = Scripted([(-2.0, False), (-4.0, False), (-3.0, False), (-1.0, False), (-1.0, False), (-8.0, False)])
    done: list[int] = []
    found = run_task(TASKS["arc_easy"], examples, forward, tokenizer, max_context=64, on_example=done.append)  # type: ignore[arg-type]
    assert found.metrics["acc"].value == pytest.approx(1 / 3)
    assert found.metrics["acc"].error == pytest.approx(math.sqrt((1 / 3) * (2 / 3) / 2))  # lm-eval's: n - 1 below
    assert found.metrics["acc_norm"].value == pytest.approx(2 / 3)
    assert done == [1, 2, 3]
    assert [row[:3] for row in describe([found])] == [("arc_easy", "3", "acc"), ("arc_easy", "3", "acc_norm")]


def test_last_words_by_hand(tokenizer):
    examples = [Example((("why", " blue"),), (4,), 0)] * 2
    forward = Scripted([(-1.0, True), (-3.0, False)])
    found = run_task(TASKS["lambada_openai"], examples, forward, tokenizer, max_context=64)  # type: ignore[arg-type]
    assert found.metrics["acc"].value == 0.5
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(2))
    assert found.metrics["perplexity"].error == pytest.approx(math.exp(2) * 1.0)
