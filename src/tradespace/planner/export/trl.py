"""A configuration for `trl sft --config`: the model held as the plan holds it, adapters trained on it. A plan for serving says nothing about training's own
memory (gradients, optimizer, activations), which is noted."""

from __future__ import annotations

import yaml

from tradespace.planner.candidate import Candidate
from tradespace.planner.export.parts import DTYPES, Export, common_notes

_ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2", "reference": "eager"}


def export(candidate: Candidate, model: str) -> Export:
    plan, notes = candidate.plan, [note for note in common_notes(candidate, "TRL") if not note.startswith(("KV", "values held"))]
    weights = plan.weights.default
    settings: dict[str, object] = {"model_name_or_path": model, "dtype": DTYPES.get(weights, "bfloat16")}
    if weights not in DTYPES:
        bits = "load_in_8bit" if weights.startswith(("int8", "fp8", "q8", "w8")) else "load_in_4bit"
        settings[bits] = True
        if bits == "load_in_4bit":
            settings |= {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": weights != "nf4-plain"}
        if weights not in ("nf4", "nf4-plain"):
            notes.append(f"weights in {weights}: TRL quantizes through bitsandbytes only; {bits} is near")
    if plan.attention in _ATTENTION:
        settings["attn_implementation"] = _ATTENTION[plan.attention]
    else:
        notes.append(f"attention kernel {plan.attention}: TRL takes transformers' own")
    settings |= {
        "max_length": plan.max_context,
        "per_device_train_batch_size": plan.max_sequences,
        "gradient_checkpointing": True,
        "use_peft": True,
        "lora_r": 16,
        "output_dir": "tuned",
    }
    if plan.tensor_parallel > 1:
        notes.append(f"tensor parallel over {plan.tensor_parallel} devices: TRL shards through accelerate (FSDP or DeepSpeed), configured there")
    if plan.placement.streamed_layers:
        notes.append(f"{plan.placement.streamed_layers} layers streamed: TRL offloads through accelerate or DeepSpeed, configured there")
    notes += [
        "the KV cache, blocks and steps: training has none",
        "the budget: this plan is for serving; gradients, optimizer and activations come on top of the weights and are not in it",
    ]
    text = "# trl sft --config sft.yaml --dataset_name NAME\n" + yaml.safe_dump(settings, sort_keys=False)
    return Export(tool="trl", text=text, file_name="sft.yaml", notes=tuple(notes))
