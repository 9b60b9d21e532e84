"""A Python file for transformers: `from_pretrained` and a GenerationConfig. It pads batches and bounds nothing but the device map."""

from __future__ import annotations

from tradespace.planner.candidate import Candidate
from tradespace.planner.export.parts import DTYPES, Export, common_notes

_QUANTIZED = {
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)',
    "nf4-plain": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)',
    "fp8-block": "FineGrainedFP8Config()",
}
_CACHE = {"int4": 4, "int2": 2, "int8": 8}
_ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2", "reference": "eager"}


def export(candidate: Candidate, model: str) -> Export:
    plan, notes = candidate.plan, common_notes(candidate, "transformers")
    weights, imports, arguments = plan.weights.default, ["AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"], []
    if weights in DTYPES:
        arguments.append(f"dtype=torch.{DTYPES[weights]}")
    else:
        arguments.append("dtype=torch.bfloat16")
        if weights in _QUANTIZED:
            imports.append(_QUANTIZED[weights].split("(")[0])
            arguments.append(f"quantization_config={_QUANTIZED[weights]}")
            if weights == "int8":
                notes.append("int8: bitsandbytes keeps outlier columns in 16 bits beside it")
        else:
            notes.append(f"weights in {weights}: transformers reads them from a checkpoint only; make one with: tradespace quantize {model} --format {weights}")
    if plan.attention in _ATTENTION:
        arguments.append(f'attn_implementation="{_ATTENTION[plan.attention]}"')
    else:
        notes.append(f"attention kernel {plan.attention}: transformers chooses its own")
    if candidate.question.device.kind == "cuda":
        budgets: dict[int | str, str] = dict.fromkeys(range(plan.tensor_parallel), f"{plan.memory_bytes // 2**20}MiB")
        if plan.placement.streamed_layers:
            budgets["cpu"] = f"{candidate.host_bytes // 2**20 + 1}MiB"
        arguments += ['device_map="auto"', f"max_memory={budgets!r}"]
        notes.append("max_memory bounds weights; cache and activations come on top")
        if plan.tensor_parallel > 1:
            notes.append("tensor parallel: a device map puts whole layers on each card, which work one after another")
    else:
        arguments.append('device_map="cpu"')
        notes.append("a budget of host memory: transformers bounds nothing there")
    generation = [f"max_new_tokens={candidate.question.workload.output_tokens}"]
    if plan.kv.store in _CACHE:
        generation += ['cache_implementation="quantized"', f'cache_config={{"backend": "quanto", "nbits": {_CACHE[plan.kv.store]}}}']
    elif plan.kv.store not in ("bf16", "fp16"):
        notes.append(f"KV store {plan.kv.store}: transformers holds the cache in the model's dtype, or in int2, int4 or int8 through quanto")
    if plan.kv.layout == "paged":
        notes.append("a paged cache: generate() holds one region a sequence and pads a batch to its longest")
    if plan.max_sequences > 1:
        notes.append(f"{plan.max_sequences} sequences at once: batch them yourself; none joins or leaves while a batch runs")
    notes.append(f"a context of {plan.max_context} tokens, {plan.step_tokens} a step: not bounded there")
    text = "\n".join(
        [
            "import torch",
            f"from transformers import {', '.join(sorted(imports))}",
            "",
            f"MODEL = {model!r}",
            "tokenizer = AutoTokenizer.from_pretrained(MODEL)",
            "model = AutoModelForCausalLM.from_pretrained(",
            "    MODEL,",
            *(f"    {argument}," for argument in arguments),
            ")",
            f"generation = GenerationConfig({', '.join(generation)})",
            'inputs = tokenizer("Why is the sky blue?", return_tensors="pt").to(model.device)',
            "print(tokenizer.decode(model.generate(**inputs, generation_config=generation)[0], skip_special_tokens=True))",
            "",
        ]
    )
    return Export(tool="transformers", text=text, file_name="run_transformers.py", notes=tuple(notes))
