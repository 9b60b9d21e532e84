"""vLLM's side of `gpu_peers.vllm`, run with vLLM on the module path: dummy weights, prompts as token ids, no prefix cache, greedy, all tokens asked for."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tradespace.measure.record import write_atomically

SHARE = 0.9  # of the card's memory, which is its default


def main(question: str, answer: str) -> None:
    import vllm  # pyright: ignore[reportMissingImports]

    given: dict[str, Any] = json.loads(Path(question).read_text())
    started = time.perf_counter()
    llm = vllm.LLM(
        model=given["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=given["max_context"],
        gpu_memory_utilization=SHARE,
        max_num_seqs=given["max_sequences"],
        enable_prefix_caching=False,
        quantization=given["quantization"],
    )
    start_up_s = time.perf_counter() - started
    found = []
    for prompts, output in given["requests"]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = vllm.SamplingParams(temperature=0.0, max_tokens=output, min_tokens=output, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        done = llm.generate(asked, params, use_tqdm=False)
        found.append((time.perf_counter() - started, sum(len(each.outputs[0].token_ids) for each in done)))
    settings = f"{given['quantization'] or 'bf16'} weights, bf16 cache, {SHARE:.0%} of the card"
    result = {"name": f"vLLM {vllm.__version__}", "settings": settings, "start_up_s": start_up_s, "answer": found}
    write_atomically(Path(answer), json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
