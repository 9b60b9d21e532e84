"""llama.cpp through its C functions: one `llama_decode` a step for all sequences, keys and values in fp16, the likeliest token taken by numpy.

Decoding goes on from one prompt that is kept and cut back to: what a step costs depends on how many positions there are, not on which tokens.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np

from tradespace.lab.bench.task import Task

FLASH = {"default": -1, "no flash attention": 0, "flash attention": 1}
CELLS = 256  # llama.cpp rounds a cache up to these


def variants(task: Task) -> dict[str, dict[str, Any]]:
    found = {name: {"flash": value, "unified": False} for name, value in FLASH.items()}
    if task.sequences > 1:
        found["one cache for all"] = {"flash": -1, "unified": True}
    return found


class Session:
    def __init__(self, task: Task, settings: dict[str, Any]):
        import llama_cpp as library  # pyright: ignore[reportMissingImports]  # a peer: there or not

        self._library, self._task = library, task
        library.llama_backend_init()
        model = library.llama_model_default_params()
        if task.device != "cpu" and not library.llama_supports_gpu_offload():
            raise RuntimeError("this llama.cpp was built without CUDA")
        model.n_gpu_layers, model.main_gpu = (0, 0) if task.device == "cpu" else (999, int(task.device.partition(":")[2] or 0))
        self._model = library.llama_model_load_from_file(task.path.encode(), model)
        if not self._model:
            raise RuntimeError("llama.cpp does not open this file")
        vocabulary = library.llama_model_get_vocab(self._model)
        assert vocabulary is not None, "a loaded model has one"
        self._vocabulary = library.llama_vocab_n_tokens(vocabulary)
        each = -(-(task.prompt + task.tokens + 16) // CELLS) * CELLS
        context = library.llama_context_default_params()
        context.n_ctx, context.n_seq_max, context.kv_unified = each * task.sequences, task.sequences, settings["unified"]
        context.n_threads = context.n_threads_batch = task.threads
        context.flash_attn_type = settings["flash"]
        self._step_tokens = context.n_batch
        self._context = library.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp does not take these settings for this model")
        self._memory = library.llama_get_memory(self._context)
        self._batch = library.llama_batch_init(self._step_tokens, 0, 1)
        self._ids, self._positions, self._wanted = (
            np.ctypeslib.as_array(pointer, (self._step_tokens,)) for pointer in (self._batch.token, self._batch.pos, self._batch.logits)
        )
        self._held: list[int] = []  # lengths of the prompts in the cache

    def measure(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        lengths = [len(prompt) for prompt in prompts]
        start = time.perf_counter()
        if not tokens or lengths != self._held:
            self._held = []
            self._library.llama_memory_clear(self._memory, False)
            self._best = [self._prefill(sequence, prompt) for sequence, prompt in enumerate(prompts)]
            self._held = lengths
        ready = time.perf_counter()
        rows = np.arange(len(prompts))
        self._fill(np.array(self._best), np.array(lengths), rows, np.ones(len(prompts), np.int8))
        begin = time.perf_counter()
        for _ in range(tokens):
            self._decode()
            self._ids[: len(rows)] = [self._likeliest(row) for row in range(len(rows))]
            self._positions[: len(rows)] += 1
        end = time.perf_counter()
        for sequence, length in enumerate(lengths):
            self._library.llama_memory_seq_rm(self._memory, sequence, length, -1)
        return {"prefill_s": ready - start, "decode_s": end - begin}

    def _prefill(self, sequence: int, prompt: list[int]) -> int:
        for start in range(0, len(prompt), self._step_tokens):
            piece = prompt[start : start + self._step_tokens]
            wanted = np.zeros(len(piece), np.int8)
            wanted[-1] = start + len(piece) == len(prompt)
            self._fill(np.array(piece), np.arange(start, start + len(piece)), np.full(len(piece), sequence), wanted)
            self._decode()
        return self._likeliest((len(prompt) - 1) % self._step_tokens)

    def _fill(self, ids: np.ndarray, positions: np.ndarray, sequences: np.ndarray, wanted: np.ndarray) -> None:
        count = self._batch.n_tokens = len(ids)
        self._ids[:count], self._positions[:count], self._wanted[:count] = ids, positions, wanted
        for row, sequence in enumerate(sequences.tolist()):
            self._batch.n_seq_id[row] = 1
            self._batch.seq_id[row][0] = sequence

    def _decode(self) -> None:
        if code := self._library.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode failed with {code}")

    def _likeliest(self, row: int) -> int:
        logits = self._library.llama_get_logits_ith(self._context, ctypes.c_int32(row))
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def facts(self) -> dict[str, str | int]:
        return {"system": self._library.llama_print_system_info().decode().strip(" |")}
