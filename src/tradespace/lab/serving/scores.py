"""Do lm-eval's `local-completions`, over HTTP, and `tradespace eval` give the same scores on the same examples? (EleutherAI/lm-evaluation-harness 0.4)"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tradespace.errors import EngineError, UnsupportedError
from tradespace.lab.common import command_line, data_file, markdown_table
from tradespace.lab.serving.process import MODEL, Server
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record

MEMORY, CONTEXT = "1GiB", 1024
WORDS = ("--memory", MEMORY, "--max-num-seqs", "8", "--context", str(CONTEXT), "--no-grammars")
# how lm-eval asks each task, said in its own terms over our files
CHOICE = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}
ASKED: dict[str, dict[str, Any]] = {
    "arc_easy": {**CHOICE, "doc_to_text": "{{query}}\nAnswer:", "metrics": ("acc", "acc_norm")},
    "piqa": {**CHOICE, "doc_to_text": "{{query}}Answer:", "metrics": ("acc", "acc_norm")},
    "winogrande": {
        "output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_target": "continuation", "doc_to_choice": "context_options", "metrics": ("acc",),
    },
    "lambada_openai": {
        "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}", "target_delimiter": "",
        "metrics": ("acc", "perplexity"),
    },
}  # fmt: skip


def task_file(name: str) -> str:
    """lm-eval's description of one task, as JSON, which is YAML."""
    asked = dict(ASKED[name])
    metrics = [{"metric": metric, "aggregation": "perplexity" if metric == "perplexity" else "mean"} for metric in asked.pop("metrics")]
    files = {"test": str(data_file("tasks", f"{name}.jsonl"))}
    return json.dumps(
        {"task": f"ours_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test", "metric_list": metrics, **asked}
    )


def by_lm_eval(server: Server, folder: Path, limit: int) -> dict[str, dict[str, float]]:
    """Its scores, by task and metric. Raises UnsupportedError where it is not installed, EngineError where it fails."""
    for package in ("lm_eval", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(f"this experiment compares with lm-eval, and {package} is not installed. Run: pip install 'lm_eval[api]' transformers")
    from transformers import AutoTokenizer

    from tradespace.loading.resolve import resolve

    files = resolve(MODEL, offline=True)
    tokenizer = AutoTokenizer.from_pretrained(str(files.folder), gguf_file=files.weights[0].name)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    for name in ASKED:
        (folder / f"{name}.yaml").write_text(task_file(name), encoding="utf-8")
    settings = f"model={MODEL},base_url=http://127.0.0.1:{server.port}/v1/completions,num_concurrent=4,max_retries=1,tokenized_requests=True"
    settings += f",tokenizer={folder / 'tokenizer'},max_length={CONTEXT},timeout=1800"
    words = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", settings, "--include_path", str(folder), "--limit", str(limit)]
    words += ["--tasks", ",".join(f"ours_{name}" for name in ASKED), "--output_path", str(folder / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"})
    results = sorted((folder / "out").rglob("results*.json"))
    if done.returncode or not results:
        raise EngineError(f"lm-eval failed: {' | '.join(done.stderr.strip().splitlines()[-4:])}")
    found = json.loads(results[-1].read_text(encoding="utf-8"))["results"]
    return {name: {metric: found[f"ours_{name}"][f"{metric},none"] for metric in ASKED[name]["metrics"]} for name in ASKED}


def by_us(limit: int) -> tuple[str, dict[str, dict[str, float]]]:
    """Plan and scores of `tradespace eval`, in a process of its own."""
    folder = data_file("tasks", "piqa.jsonl").parent
    words = [sys.executable, "-m", "tradespace", "eval", MODEL, "--tasks", ",".join(ASKED), "--task-data", str(folder), "--limit", str(limit), "--json"]
    done = subprocess.run([*words, "--memory", MEMORY, "--context", str(CONTEXT)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"tradespace eval failed: {' | '.join(done.stderr.strip().splitlines()[-4:])}")
    found = json.loads(done.stdout)
    return found["plan"], {task["task"]: {name: metric["value"] for name, metric in task["metrics"].items()} for task in found["tasks"]}


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    limit = 10 if quick else 100
    with tempfile.TemporaryDirectory(prefix="tradespace-scores-") as folder, Server(*WORDS) as server:
        plan = server.get("/ready")[1]["plan"]
        theirs = by_lm_eval(server, Path(folder), limit)
    our_plan, ours = by_us(limit)
    rows = []
    for task, metrics in theirs.items():
        for metric, value in metrics.items():
            rows.append({"task": task, "metric": metric, "examples": limit, "lm_eval": value, "ours": ours[task][metric]})
            say(f"{task} {metric}: lm-eval {value:.6g}, tradespace eval {ours[task][metric]:.6g}")
    rows.append({"task": "plans", "served": plan, "evaluated": our_plan})
    version = importlib.metadata.version("lm_eval")
    notes = f"{MODEL}; lm-eval {version}, local-completions with token ids, against the server; tradespace eval in its own process"
    return new_record("serve-scores", command=command_line(), device=this_machine(), repeats=limit, rows=rows, notes=notes)


def same(row: dict[str, Any]) -> bool:
    """Equal accuracies; perplexities to a thousandth (the batches that a text is read in differ, and so do roundings)."""
    return row["ours"] == row["lm_eval"] if row["metric"] != "perplexity" else abs(row["ours"] / row["lm_eval"] - 1) < 1e-3


def markdown(record: Record) -> str:
    table = [
        (row["task"], row["metric"], f"{row['examples']}", f"{row['lm_eval']:.4f}", f"{row['ours']:.4f}", "yes" if same(dict(row)) else "NO")
        for row in record.rows
        if row["task"] != "plans"
    ]
    return markdown_table(("task", "metric", "examples", "lm-eval over HTTP", "tradespace eval", "same"), table, left=2) + f"\n\n{record.notes}."
