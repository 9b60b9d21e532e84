"""OpenVINO GenAI, which reads some GGUF files itself (Llama's and Qwen's architectures in Q4_0, Q8_0, F16). Its own clock is taken: a call's metrics."""

from __future__ import annotations

from typing import Any

import numpy as np

from tradespace.lab.bench.task import Task


def variants(task: Task) -> dict[str, dict[str, Any]]:
    """Its two ways to attend: over pages with continuous batching (the default), and a plain cache."""
    return {"paged attention": {}, "plain cache": {"ATTENTION_BACKEND": "SDPA"}}


class Session:
    def __init__(self, task: Task, settings: dict[str, Any]):
        import openvino  # pyright: ignore[reportMissingImports]  # a peer: there or not
        import openvino_genai  # pyright: ignore[reportMissingImports]  # a peer: there or not

        self._openvino, self._library = openvino, openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(task.path, "CPU", INFERENCE_NUM_THREADS=task.threads, **settings)

    def measure(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        ids = np.array(prompts, np.int64)
        inputs = self._library.TokenizedInputs(self._openvino.Tensor(ids), self._openvino.Tensor(np.ones_like(ids)))
        config = self._library.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens + 1, True, False
        metrics = self._pipeline.generate(inputs, config).perf_metrics
        # a batch of prompts counts as one request or as many, by backend
        if metrics.get_num_generated_tokens() not in (tokens + 1, (tokens + 1) * len(prompts)):
            raise RuntimeError(f"it generated {metrics.get_num_generated_tokens()} tokens, not {tokens + 1} for each of {len(prompts)}")
        first_s = max(metrics.raw_metrics.m_times_to_first_token) / 1e6  # raw metrics are in microseconds, means in milliseconds
        rest_s = metrics.get_generate_duration().mean / 1e3 - first_s
        if not 0 <= rest_s < first_s + rest_s:
            raise RuntimeError(f"its metrics contradict each other: {first_s} s up to the first token, {rest_s} s after it")
        return {"prefill_s": first_s, "decode_s": rest_s}

    def facts(self) -> dict[str, str | int]:
        return {"openvino": self._openvino.__version__}
