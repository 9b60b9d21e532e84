"""`vllm serve`. It takes a share of the device's memory rather than bytes, and chooses its own attention kernel."""

from __future__ import annotations

from tradespace.planner.candidate import Candidate
from tradespace.planner.export.parts import DTYPES, Export, command, common_notes, memory_share, streamed_gib

_ON_THE_FLY = {"fp8": "fp8", "int8": "int8_per_channel_weight_only"}  # what it quantizes to while loading
_GONE = ("nf4",)  # formats of bitsandbytes, which vLLM 0.33 does not have
_KV = {"bf16": "auto", "fp16": "auto", "fp8": "fp8"}
_BLOCKS = (8, 16, 32, 64, 128)


def export(candidate: Candidate, model: str) -> Export:
    plan, notes = candidate.plan, common_notes(candidate, "vLLM")
    arguments = ["serve", model]
    weights = plan.weights.default
    if weights in DTYPES:
        arguments += ["--dtype", DTYPES[weights]]
    elif weights in _ON_THE_FLY:
        arguments += ["--quantization", _ON_THE_FLY[weights]]
    elif weights in _GONE:
        notes.append(f"weights in {weights}: vLLM has no such format (0.33 reads nothing of bitsandbytes); plan with --weights int4 or fp8 for it")
    else:
        notes.append(f"weights in {weights}: vLLM reads them from a checkpoint only; make one with: tradespace quantize {model} --format {weights}")
    arguments += ["--max-model-len", str(plan.max_context), "--max-num-seqs", str(plan.max_sequences)]
    arguments += ["--max-num-batched-tokens", str(max(plan.step_tokens, plan.max_sequences))]
    if plan.kv.store in _KV:
        arguments += ["--kv-cache-dtype", _KV[plan.kv.store]]
    else:
        notes.append(f"KV store {plan.kv.store}: vLLM holds bf16 or fp8")
    if plan.kv.layout == "contiguous":
        notes.append("a contiguous KV layout: vLLM's cache is paged")
    elif plan.kv.block_size in _BLOCKS:
        arguments += ["--block-size", str(plan.kv.block_size), "--num-gpu-blocks-override", str(plan.num_blocks)]
    else:
        notes.append(f"blocks of {plan.kv.block_size} tokens: vLLM has {', '.join(map(str, _BLOCKS))}")
    arguments.append("--enable-prefix-caching" if plan.kv.prefix_sharing else "--no-enable-prefix-caching")
    if plan.tensor_parallel > 1:
        arguments += ["--tensor-parallel-size", str(plan.tensor_parallel)]
    if plan.placement.streamed_layers and plan.placement.stream_from == "host":
        arguments += ["--cpu-offload-gb", streamed_gib(candidate)]
        notes.append("--cpu-offload-gb counts bytes of weights, not whole layers")
    if candidate.question.device.kind == "cuda":
        arguments += ["--gpu-memory-utilization", memory_share(candidate)]
        notes.append(f"the budget of {plan.memory_bytes} bytes as a share of the card: vLLM counts what others use on it, too, and its own context beside it")
    else:
        notes.append("a budget of host memory: vLLM's CPU backend takes the cache's size from VLLM_CPU_KVCACHE_SPACE (GiB) and bounds nothing else")
    notes.append(f"attention kernel {plan.attention}: vLLM chooses its own")
    return Export(tool="vllm", text=command("vllm", arguments), arguments=tuple(arguments), notes=tuple(notes))
