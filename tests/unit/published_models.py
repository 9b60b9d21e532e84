"""What was published about the models whose configs lie in the shared folder, each with its source: parameters, active parameters, bytes of weights and cache.

`places` is the last digit that was published (1: whole billions): a figure rounded there may differ by half of it whatever the half per cent says.
`counts` says what a card's "active" counts beside the layers: the head alone, the head and the embedding table ("both"), or neither ("layers").
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One model: a piece of its files' names, billions of parameters in all and for one token."""

    piece: str
    total: float
    places: float
    source: str
    active: float | None = None
    active_places: float = 1.0
    counts: str = "head"
    note: str = ""


MODELS = (
    Published("MiniMax-M2", 230, 10, "MiniMax-M2's model card", 10, note="rounded to tens"),
    Published("Qwen3-0.6B", 0.6, 0.1, "arXiv:2505.09388, table 1", note="rounded"),
    Published("Qwen3-1.7B", 1.7, 0.1, "arXiv:2505.09388, table 1", note="rounded"),
    Published("Qwen3-8B", 8.2, 0.1, "Qwen3-8B's model card", note="rounded"),
    Published("Qwen3-32B", 32.8, 0.1, "Qwen3-32B's model card", note="rounded"),
    Published("Qwen3-30B-A3B", 30.5, 0.1, "Qwen3-30B-A3B's model card", 3.3, 0.1, "both"),
    Published("Qwen3-235B-A22B", 235, 1, "arXiv:2505.09388, table 2", 22, 1, "both"),
    Published("Qwen3-Coder-480B", 480, 1, "Qwen3-Coder-480B's model card", 35, 1, "both"),
    Published("Qwen3.5-122B", 122, 1, "Qwen3.5-122B-A10B's model card", 10, 1, "both"),
    Published("Qwen3.5-397B", 397, 1, "Qwen3.5-397B-A17B's model card", 17, 1, "both"),
    Published("Qwen3.5-27B", 27, 1, "the model's name", note="rounded to whole billions"),
    Published("Qwen3.5-35B", 35, 1, "the model's name", 3, note="rounded to whole billions"),
    Published("MiMo-V2-Flash", 309, 1, "MiMo-V2-Flash's model card", 15),
    Published("DeepSeek-R1", 671, 1, "DeepSeek-R1's model card", 37),
    Published("DeepSeek-V3_", 671, 1, "arXiv:2412.19437", 37),
    Published("DeepSeek-V3.1", 671, 1, "DeepSeek-V3.1's model card", 37),
    Published("Llama-3.1-405B", 405.85, 0.01, "405,853,388,800 in the hub's list of tensors"),
    Published("Llama-3.1-70B", 70.55, 0.01, "70,553,706,496 in the hub's list of tensors"),
    Published("Llama-3.1-8B", 8.03, 0.01, "8,030,261,248 in the hub's list of tensors"),
    Published("Mixtral-8x7B-v0.1", 46.7, 0.1, "Mistral AI's announcement of 2023-12-11", 12.9, 0.1, "both"),
    Published("Mixtral-8x22B", 141, 1, "Mistral AI's announcement of 2024-04-17", 39),
    Published("Kimi-K2", 1000, 100, "Kimi-K2's model card", 32, note='"1T", rounded'),
    Published("GLM-5-", 744, 1, "GLM-5's technical report", 40, 1, "layers"),
    Published("GLM-5_", 744, 1, "GLM-5's technical report", 40, 1, "layers"),
    Published("GLM-5.2", 744, 1, "Artificial Analysis on GLM-5.2, 2026-06-17", 40),
    Published("Nemotron-3-Nano", 31.6, 0.1, "Nemotron 3 Nano's report", 3.2, 0.1),
    Published("Nemotron-3-Super", 120.6, 0.1, "Nemotron 3 Super's report", 12.7, 0.1, "both"),
    Published("Nemotron-3-Ultra", 550, 1, "Nemotron 3 Ultra's announcement", 55),
    Published("Nemotron-H-56B", 56, 1, "arXiv:2504.03624", note="rounded to whole billions"),
    Published("gpt-oss-120b", 116.83, 0.01, "arXiv:2508.10925, table 1", 5.13, 0.01),
    Published("gpt-oss-20b", 20.91, 0.01, "arXiv:2508.10925, table 1", 3.61, 0.01),
    Published("Llama-4-Scout", 109, 1, "Llama 4's model card", 17, 1, "both", note="the card counts the vision tower, too"),
    Published("Llama-4-Maverick", 400, 1, "Llama 4's model card", 17, 1, "both"),
    Published("emma-4-26B", 25.2, 0.1, "Gemma 4's model card", 3.8, 0.1),
    Published("emma-4-31B", 30.7, 0.1, "Gemma 4's model card"),
)
VISION = {"Llama-4-Scout": 0.87}  # billions outside of the decoder that a card's total counts: 34 layers of width 1,408, hidden 5,632, and the projector

# bytes of the published files of weights, and what is in them beside the decoder that we plan
WEIGHT_BYTES = {
    "openai--gpt-oss-120b": (60.8 * 2**30, 0.05 * 2**30, "arXiv:2508.10925, table 1: 60.8 GiB"),
    "openai--gpt-oss-20b": (12.8 * 2**30, 0.05 * 2**30, "arXiv:2508.10925, table 1: 12.8 GiB"),
    # with the module that predicts one more token (`multi_token_bytes`)
    "deepseek-ai--DeepSeek-V3_": (688_586_727_753, 0.0005 * 688_586_727_753, "the files of the repository deepseek-ai/DeepSeek-V3"),
}

# bytes of cache for one token in 16 bits
CACHE_BYTES = {
    "deepseek-ai--DeepSeek-V3_": (70_272, "arXiv:2505.09343, table 1: 70.272 KB"),
    "Llama-3.1-405B": (516_096, "arXiv:2505.09343, table 1: 516.096 KB"),
    "Llama-3.1-70B": (327_680, "320 KiB: 2 × 80 layers × 8 heads × 128 × 2 B"),
    "Llama-3.1-8B": (131_072, "128 KiB: 2 × 32 layers × 8 heads × 128 × 2 B"),
    "openai--gpt-oss-120b": (73_728, "72 KiB: 2 × 36 layers × 8 heads × 64 × 2 B"),
}


def multi_token_bytes(D: int, V: int, parameters: int) -> int:
    """Of DeepSeek-V3's module: a layer in fp8; its projection (2·D² of the parameters), and copies of embedding and head, in 16 bits."""
    return parameters - 2 * D * D + 2 * (2 * D * D + 2 * V * D)
