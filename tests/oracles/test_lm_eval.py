"""lm-evaluation-harness beside us: the same questions, put to the same weights by its own templates, give the same accuracies and standard errors."""

from __future__ import annotations

import json
import math
import os
from itertools import takewhile
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")

import transformers  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import tradespace as ts  # noqa: E402
from tradespace.loading.pull import pull  # noqa: E402
from tradespace.loading.resolve import resolve  # noqa: E402
from tradespace.quality.tasks import TASKS  # noqa: E402

pytestmark = pytest.mark.weights
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"
MODEL = "smollm2-135m"
LIMIT = 50


def published(task: str, row: dict) -> dict:
    """A line of our data as the published data set has it, which is what lm-eval's templates read."""
    if task == "arc_easy":
        labels = [str(number) for number in range(len(row["choices"]))]
        choices = {"text": row["choices"], "label": labels}
        return {"question": row["query"].removeprefix("Question: "), "choices": choices, "answerKey": labels[row["gold"]]}
    if task == "piqa":
        goal = row["query"].removeprefix("Question: ").removesuffix("\n")
        return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}
    if task == "winogrande":
        first, second = row["context_options"]
        common = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
        options = {"option1": first.removeprefix(common), "option2": second.removeprefix(common)}
        return {"sentence": f"{common}_ {row['continuation']}", "answer": str(row["gold"] + 1), **options}
    return {"text": f"{row['context']} {row['continuation']}"}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict:
    """lm-eval's results on the first LIMIT examples, by its own task files with nothing but the data's place changed."""
    pull(MODEL, progress=False)
    if not DATA.is_dir():
        pytest.skip("the evaluation data (tasks) is not beside this checkout")
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("published")
    configs = []
    for name in TASKS:
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:LIMIT]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(published(name, json.loads(line))) for line in lines), encoding="utf-8")
        # every split that a task may name, so that the last one of them holds our examples
        files = {split: str(path) for split in ("train", "validation", "test")}
        config = {"include": str(TaskManager().task_index[name].yaml_path), "task": name, "dataset_path": "json", "dataset_name": None}
        configs.append(folder / f"{name}.yaml")
        configs[-1].write_text(json.dumps(config | {"dataset_kwargs": {"data_files": files}}), encoding="utf-8")  # JSON is YAML
    file = resolve(MODEL, offline=True).weights[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=2048)
    return lm_eval.simple_evaluate(harness, tasks=[str(path) for path in configs], limit=LIMIT, bootstrap_iters=1000, log_samples=False)["results"]


@pytest.fixture(scope="module")
def ours() -> dict[str, dict[str, tuple[float, float]]]:
    found = ts.evaluate(MODEL, tasks=tuple(TASKS), task_data=DATA, limit=LIMIT, weights="fp32", memory="4GiB")
    return {result.task: {name: (metric.value, metric.error) for name, metric in result.metrics.items()} for result in found.tasks}


@pytest.mark.parametrize("task", TASKS)
def test_accuracies_and_standard_errors_are_lm_evals(task, ours, theirs):
    assert set(ours[task]) == {name.split(",")[0] for name in theirs[task] if name.endswith(",none") and "stderr" not in name}
    for name, (value, error) in ours[task].items():
        expected, expected_error = theirs[task][f"{name},none"], theirs[task][f"{name}_stderr,none"]
        if name == "perplexity":
            assert value == pytest.approx(expected, rel=1e-3)
            assert math.log(error / expected_error) == pytest.approx(0, abs=0.5)  # by the delta method; theirs is resampled
        else:
            assert value == expected
            assert error == pytest.approx(expected_error, rel=1e-9)


def test_the_comparison_can_fail(ours):
    """No task is answered always or never: equal accuracies say something."""
    assert all(0 < value < 1 for result in ours.values() for name, (value, _) in result.items() if name != "perplexity")
