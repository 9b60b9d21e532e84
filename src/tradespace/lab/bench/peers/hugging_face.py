"""transformers on bf16 weights, driven by hand: the model called once a step with its own cache, which is faster than `generate`."""

from __future__ import annotations

import time
from typing import Any

from tradespace.lab.bench.task import Task


def variants(task: Task) -> dict[str, dict[str, Any]]:
    return {"sdpa": {"attn_implementation": "sdpa"}}


class Session:
    def __init__(self, task: Task, settings: dict[str, Any]):
        import torch
        import transformers

        torch.set_num_threads(task.threads)
        self._torch, self._device = torch, task.device
        self._model = transformers.AutoModelForCausalLM.from_pretrained(task.path, dtype=torch.bfloat16, **settings).eval()
        if task.device != "cpu":
            self._model.to(torch.device(task.device))  # pyright: ignore[reportArgumentType]  # transformers wraps the method

    def measure(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        torch = self._torch
        with torch.inference_mode():
            ids = torch.tensor(prompts, device=self._device)
            self._wait()
            start = time.perf_counter()
            out = self._model(ids, use_cache=True, logits_to_keep=1)
            best = out.logits[:, -1].argmax(-1, keepdim=True)
            self._wait()
            ready = time.perf_counter()
            for _ in range(tokens):
                out = self._model(best, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                best = out.logits[:, -1].argmax(-1, keepdim=True)
            self._wait()
            end = time.perf_counter()
        return {"prefill_s": ready - start, "decode_s": end - ready}

    def _wait(self) -> None:
        if self._device != "cpu":
            self._torch.cuda.synchronize(self._device)

    def facts(self) -> dict[str, str | int]:
        return {"torch": self._torch.__version__}
