"""The peers in experiment train-gpu: transformers, with PEFT's adapters and bitsandbytes' nf4 where the case asks for them."""

from __future__ import annotations

import time
from typing import Any

import torch

from tradespace.lab.train_gpu_ours import device_bytes
from tradespace.spec.training import flops_per_token
from tradespace.spec.zoo import find_model

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peer(case: Any, T: int, tiny: bool) -> dict[str, Any]:
    """Seconds and peak bytes of a case."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, vocab, T = (TINY, 512, 64) if tiny else (SHAPES[case.model], 128_256, T)
    config = LlamaConfig(**shape, vocab_size=vocab, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if case.method == "qlora":
        _to_nf4(model, device)
    if case.checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.method != "full":
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)
    ids = torch.randint(0, vocab, (case.batch, T), device=device)
    seconds: list[float] = []
    loss = torch.zeros(())
    for step in range(case.steps + 2):
        if step == 2 and device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds[2:], "plan": f"{case.method}, checkpointing {case.checkpointing}, AdamW", "loss": float(loss.detach()),
        "flops_per_token": flops_per_token(find_model(case.model), T), **device_bytes(),
    }  # fmt: skip


def _to_nf4(model: torch.nn.Module, device: torch.device) -> None:
    """All linears but the head by bitsandbytes, scales quantized, too."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                coded = Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
                held = child.weight.data.cpu()
                coded.weight = Params4bit(held, requires_grad=False, quant_type="nf4", compress_statistics=True)  # pyright: ignore[reportCallIssue]
                setattr(module, name, coded.to(device))
                child.weight = None  # pyright: ignore[reportAttributeAccessIssue] - its bytes are wanted before the next one
    if device.type == "cuda":
        torch.cuda.empty_cache()
