"""`python -m sglang.launch_server`. Its share of memory covers weights and cache, not activations."""

from __future__ import annotations

from tradespace.planner.candidate import Candidate
from tradespace.planner.export.parts import DTYPES, Export, command, common_notes, memory_share, streamed_gib

_KV = {"bf16": "bf16", "fp16": "auto", "fp8": "fp8_e4m3"}
_ATTENTION = {"flash": "fa3", "sdpa": "torch_native"}


def export(candidate: Candidate, model: str) -> Export:
    plan, notes = candidate.plan, common_notes(candidate, "SGLang")
    arguments = ["--model-path", model]
    weights = plan.weights.default
    if weights in DTYPES:
        arguments += ["--dtype", DTYPES[weights]]
    elif weights == "fp8":
        arguments += ["--quantization", "fp8"]
    else:
        notes.append(f"weights in {weights}: SGLang reads them from a checkpoint only; make one with: tradespace quantize {model} --format {weights}")
    arguments += ["--context-length", str(plan.max_context), "--max-running-requests", str(plan.max_sequences)]
    arguments += ["--chunked-prefill-size", str(plan.step_tokens), "--max-total-tokens", str(plan.kv_tokens)]
    if plan.kv.store in _KV:
        arguments += ["--kv-cache-dtype", _KV[plan.kv.store]]
    else:
        notes.append(f"KV store {plan.kv.store}: SGLang holds bf16 or fp8")
    if plan.kv.layout == "paged":
        arguments += ["--page-size", str(plan.kv.block_size)]
    else:
        notes.append("a contiguous KV layout: SGLang's cache is paged")
    if not plan.kv.prefix_sharing:
        arguments.append("--disable-radix-cache")
    if plan.tensor_parallel > 1:
        arguments += ["--tp-size", str(plan.tensor_parallel)]
    if plan.placement.streamed_layers and plan.placement.stream_from == "host":
        arguments += ["--cpu-offload-gb", str(max(1, round(float(streamed_gib(candidate)))))]
        notes.append("--cpu-offload-gb counts whole GiB of weights, not layers")
    if candidate.question.device.kind == "cuda":
        arguments += ["--mem-fraction-static", memory_share(candidate)]
        notes.append(f"the budget of {plan.memory_bytes} bytes: SGLang's share is for weights and cache; activations come on top")
    else:
        arguments += ["--device", "cpu"]
        notes.append("a budget of host memory: SGLang bounds weights and cache only")
    if plan.attention not in _ATTENTION:
        notes.append(f"attention kernel {plan.attention}: SGLang chooses its own")
    else:
        arguments += ["--attention-backend", _ATTENTION[plan.attention]]
    return Export(tool="sglang", text=command("python -m sglang.launch_server", arguments), arguments=tuple(arguments), notes=tuple(notes))
