"""`llama-server`. Its context is that of all slots together, and layers outside of the device are computed on the processor, not streamed."""

from __future__ import annotations

from tradespace.planner.candidate import Candidate
from tradespace.planner.export.parts import Export, command, common_notes

_KV = {"bf16": "bf16", "fp16": "f16", "int8": "q8_0", "int4": "q4_0", "fp32": "f32"}
_FORMATS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int8": "Q8_0", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0", "q5_1": "Q5_1",
            "q4_k": "Q4_K_M", "q5_k": "Q5_K_M", "q6_k": "Q6_K", "int4": "Q4_K_M"}  # fmt: skip


def gguf_name(candidate: Candidate, model: str, notes: list[str]) -> str:
    """The GGUF file to load: the model itself where it is one, else the name that its conversion would have."""
    if model.endswith(".gguf"):
        return model
    weights = candidate.plan.weights.default
    kind = _FORMATS.get(weights) or _FORMATS.get(weights.split("-")[0])
    if kind is None:
        kind = "Q8_0" if candidate.quality.value == 0 else "Q4_K_M"
        notes.append(f"weights in {weights}: GGUF has no such format; {kind} is near")
    elif weights not in ("bf16", "fp16", "fp32") and weights not in _FORMATS.get(weights, "").lower():
        notes.append(f"weights in {weights}: {kind} is near, with scales of its own")
    return f"{model.rsplit('/', 1)[-1]}.{kind}.gguf"


def export(candidate: Candidate, model: str) -> Export:
    plan, notes = candidate.plan, common_notes(candidate, "llama.cpp")
    arguments = ["-m", gguf_name(candidate, model, notes)]
    arguments += ["-c", str(plan.max_context * plan.max_sequences), "-np", str(plan.max_sequences)]
    arguments += ["-b", str(max(32, plan.step_tokens)), "-ub", str(max(32, plan.step_tokens))]
    for flag, name, store in (("-ctk", "keys", plan.kv.store), ("-ctv", "values", plan.kv.value_store)):
        if store in _KV:
            arguments += [flag, _KV[store]]
        else:
            notes.append(f"{name} in {store}: llama.cpp's cache holds {', '.join(_KV.values())}")
    if plan.kv.store in ("int8", "int4") or plan.attention == "flash":
        arguments += ["-fa", "on"]
    if candidate.question.device.kind == "cpu":
        arguments += ["-ngl", "0"]
    else:
        layers = candidate.question.model.L
        arguments += ["-ngl", str(layers + 1 - plan.placement.streamed_layers) if plan.placement.streamed_layers else "99"]
        if plan.placement.streamed_layers:
            notes.append(f"{plan.placement.streamed_layers} layers streamed: llama.cpp computes them on the processor instead, at its own speed")
    if plan.threads:
        arguments += ["-t", str(plan.threads)]
    if plan.tensor_parallel > 1:
        arguments += ["-sm", "row"]
        notes.append("tensor parallel: `-sm row` splits matrices over the cards it finds; how many is set by CUDA_VISIBLE_DEVICES")
    if plan.kv.layout == "paged":
        notes.append(f"blocks of {plan.kv.block_size} tokens: llama.cpp's cache is one region")
    notes.append(f"the budget of {plan.memory_bytes} bytes: llama.cpp takes what these settings come to and checks nothing")
    return Export(tool="llama.cpp", text=command("llama-server", arguments), arguments=tuple(arguments), notes=tuple(notes))
