"""An ollama Modelfile, with the server's variables in front as comments: cache type and slots are the server's there, not the model's."""

from __future__ import annotations

from tradespace.planner.candidate import Candidate
from tradespace.planner.export.llama_cpp import gguf_name
from tradespace.planner.export.parts import Export, common_notes

_KV = {"bf16": "f16", "fp16": "f16", "int8": "q8_0", "int4": "q4_0"}


def export(candidate: Candidate, model: str) -> Export:
    plan, notes = candidate.plan, common_notes(candidate, "ollama")
    source = model.removeprefix("ollama:") if model.startswith("ollama:") else f"./{gguf_name(candidate, model, notes)}"
    variables = {"OLLAMA_NUM_PARALLEL": str(plan.max_sequences)}
    if plan.kv.store in _KV:
        variables |= {"OLLAMA_KV_CACHE_TYPE": _KV[plan.kv.store]}
        if _KV[plan.kv.store] != "f16":
            variables |= {"OLLAMA_FLASH_ATTENTION": "1"}
        elif plan.kv.store == "bf16":
            notes.append("a cache in bf16: ollama's is fp16, of the same size")
    else:
        notes.append(f"KV store {plan.kv.store}: ollama's cache holds {', '.join(sorted(set(_KV.values())))}")
    parameters = {"num_ctx": str(plan.max_context), "num_batch": str(max(32, plan.step_tokens))}
    if candidate.question.device.kind == "cpu":
        parameters["num_gpu"] = "0"
    elif plan.placement.streamed_layers:
        parameters["num_gpu"] = str(candidate.question.model.L + 1 - plan.placement.streamed_layers)
        notes.append(f"{plan.placement.streamed_layers} layers streamed: ollama computes them on the processor instead")
    if plan.threads:
        parameters["num_thread"] = str(plan.threads)
    if plan.tensor_parallel > 1:
        notes.append("tensor parallel: ollama spreads whole layers over the cards it finds")
    if plan.kv.layout == "paged":
        notes.append(f"blocks of {plan.kv.block_size} tokens: ollama's cache is one region")
    notes.append(f"the budget of {plan.memory_bytes} bytes: ollama takes what it finds free")
    lines = [f"# start the server with: {' '.join(f'{name}={value}' for name, value in variables.items())} ollama serve"]
    lines += ["# then: ollama create tradespace -f Modelfile", f"FROM {source}", *(f"PARAMETER {name} {value}" for name, value in parameters.items())]
    return Export(tool="ollama", text="\n".join(lines) + "\n", file_name="Modelfile", notes=tuple(notes))
