"""The questions, each with the commands that answer it. `generate.py` runs them while the site is built."""

from __future__ import annotations

# question → (what to look at, commands)
QUESTIONS: list[tuple[str, str, list[str]]] = [
    (
        "A 70B model and 40 GB?",
        "In 16 bits the weights alone take 138 GB. Four bits fit whole; eight bits need two cards, or layers that are streamed at every token.",
        ["plan llama-2-70b --memory 40GB --device a100-40gb --kv-store bf16"],
    ),
    (
        "What is GQA's trade-off?",
        "Fewer key-value heads shrink the cache in proportion and leave the weights nearly as they are. The model must have been trained so.",
        ["plan llama-2-70b --what-if kv_heads=64 --device a100-80gb --context 4096 --concurrency 16"],
    ),
    (
        "Why is decode memory-bound?",
        "A step of decoding reads every weight for each sequence's single token: about one operation a byte, where a device offers hundreds. The line under "
        "the frontier states both for the chosen plan.",
        ["plan llama-2-7b --memory 22GB --device l4 --weights int8 --kv-store bf16"],
    ),
    (
        "When does quantization hurt?",
        "Look at the column KL: nats per token against the 16-bit model, measured where a record exists, else cited. Below four bits it is chosen last.",
        ["plan qwen3-0.6b --memory 2GB --device ryzen-7950x --kv-store bf16 --attention native"],
    ),
    (
        "How large is the KV cache of Llama-2-70B at 16 × 4,096?",
        "2 · 80 layers · 8 heads · 128 · 2 bytes a token, times 65,536 tokens: 21.47 GB, or 20.0 GiB. With 64 key-value heads it would be eight times that.",
        ["plan llama-2-70b --what-if kv_heads=64 --device h200 --context 4096 --concurrency 16"],
    ),
    (
        "How does flash attention change the trade-off?",
        "It never holds the matrix of scores: the line `workspace` of the ledger. The reference kernel holds it, and pays.",
        [
            f"plan llama-3.1-8b --memory 70GB --device h100-80gb --context 32768 --prompt 30000 --output 500 --weights bf16 --kv-store bf16 --attention {name}"
            for name in ("reference", "flash")
        ],
    ),
    (
        "How do we fit huge models on small hardware?",
        "Fewer bits, layers that are streamed, more devices, or a smaller model: the alternatives under the table, each with its ledger.",
        ["plan llama-3.1-70b --memory 24GB --device rtx-4090 --kv-store bf16"],
    ),
    (
        "How do we break the quadratic curse?",
        "By looking at less: a window makes the work linear in the context and the cache constant. On a model that was not trained so it is lossy, and nobody "
        "knows how much until it is measured.",
        ["plan llama-3.1-8b --memory 20GB --device rtx-4090 --context 65536 --attention-pattern sliding:4096 --weights int8 --kv-store bf16"],
    ),
    (
        "What if the giant is overkill?",
        "Everything that fits whole, by published score.",
        ["fit --memory 6GB --device rtx-4090"],
    ),
    (
        "How can it write faster?",
        "Decode waits for bytes: fewer bits a weight, then a faster memory. Compare the speeds along the frontier.",
        ["plan llama-3.1-8b --memory 20GB --device rtx-4090 --kv-store bf16 --attention flash"],
    ),
    (
        "How do the ideas fit together?",
        "They are axes: weights, cache (what stays, where, how), kernel, placement, devices. `why not` names each value that lost, and why.",
        ["plan llama-2-13b --memory 24GB --device rtx-3090 --concurrency 8 --kv-layout paged"],
    ),
]
