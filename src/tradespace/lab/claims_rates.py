"""Claims about operations, traffic and who sees whom that our own cost and spec functions decide; devices by their data sheets."""

from __future__ import annotations

from collections.abc import Callable
from math import log2, sqrt

from tradespace.cost.summary import summarize, weight_share
from tradespace.cost.traffic import Axes, StepWork, cache_read_bytes, cache_share, causal_pairs, decode_work, prefill_work, score_traffic_bytes
from tradespace.lab.claims_found import CONFIRMED, HOLDS_IF, Found, judged, near
from tradespace.lab.claims_sizes import GB, all_heads, mixture_parts
from tradespace.lab.fitting import exponent
from tradespace.spec.attention import chunk_size
from tradespace.spec.attention_pattern import BlockSparse, Selected
from tradespace.spec.device import DeviceSpec
from tradespace.spec.device_zoo import find_device
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec, RoutedFFN
from tradespace.spec.plan import KVPlan, Plan
from tradespace.spec.tensors import num_parameters
from tradespace.spec.weights import WeightPlan
from tradespace.spec.zoo import find_model

LONG = 32_768


def balance(device: DeviceSpec) -> float:
    """Operations that a device does in the time of reading one byte, 16-bit matrices."""
    return device.matmul_flops_per_s["bf16"].require() / device.read_bytes_per_s.require()


def fp16_plan(model: ModelSpec, sequences: int = 1) -> Plan:
    return Plan(
        model=model.name, weights=WeightPlan(default="fp16"), kv=KVPlan(store="fp16"), attention="flash", max_sequences=sequences, kv_tokens=sequences * 1024
    )


def decoding(model: ModelSpec, sequences: int = 1, length: float = 512) -> StepWork:
    """A decode step in fp16: `sequences` that hold `length` tokens each."""
    summary, plan = summarize(model), fp16_plan(model, sequences)
    return decode_work(summary, weight_share(summary, plan.weights), cache_share(summary, plan), Axes.of(plan), sequences, length)


def prefilling(model: ModelSpec, tokens: int) -> StepWork:
    summary, plan = summarize(model), fp16_plan(model)
    return prefill_work(summary, weight_share(summary, plan.weights), cache_share(summary, plan), Axes.of(plan), tokens, tokens)


def dense_cost() -> Found:
    small, large = find_model("llama-2-7b"), find_model("llama-2-70b")
    flops, parameters = decoding(large).flops / decoding(small).flops, num_parameters(large) / num_parameters(small)
    return judged(near(flops, parameters, 0.05), f"operations ×{flops:.2f}, parameters ×{parameters:.2f}")


def binding() -> Found:
    model, device = find_model("llama-2-7b"), find_device("h100-80gb")
    decode, prefill = decoding(model).arithmetic_intensity, prefilling(model, 2048).arithmetic_intensity
    edge = balance(device)
    memory = decode < edge, prefill < edge
    text = f"it decodes few sequences: {decode:.1f} operations a byte at batch 1, {prefill:,.0f} in a prefill of 2,048; the H100 wants {edge:.0f}"
    return Found(CONFIRMED if all(memory) else HOLDS_IF, text)


def williams() -> Found:
    """t = 4·n²·H operations of one head; what it would allow, against what kernels hold (in numbers)."""
    H = 64
    rows = []
    for n in (4096, LONG):
        t = 4 * n * n * H
        rows.append((n, sqrt(t * log2(t))))
    bound = exponent(rows)
    text = f"√(t log t) for one head grows as n^{bound:.2f} ({rows[-1][1]:,.0f} at 32K); chunks hold √n = {chunk_size(LONG)} keys, tiles a constant, caches n"
    return judged(False, text + ". None is the bound, and it says nothing of time")


def reads_of_cache() -> Found:
    found = {}
    for name in ("llama-2-70b", "gemma-3-27b", "mistral-7b-v0.1"):
        model = find_model(name)
        cache = cache_share(summarize(model), fp16_plan(model))
        whole = sum(size * layers * LONG for _, size, layers in cache)
        found[name] = cache_read_bytes(cache, LONG) / whole
    text = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    return Found(CONFIRMED if all(share == 1 for share in found.values()) else HOLDS_IF, f"no layer has a window; read at 32K tokens: {text}")


def fused_traffic() -> Found:
    model = find_model("llama-2-7b")
    summary = summarize(model)
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Attention)
    n = 4096
    tiles = model.L * n * 2 * (2 * mixer.N * mixer.H + 2 * mixer.K * mixer.H)  # q, out, k, v once, 16 bits
    written = tiles + score_traffic_bytes(summary, "reference", causal_pairs(n, None), 1)
    return judged(tiles <= written / 2, f"{written / GB:.0f} GB with scores written out, {tiles / GB:.1f} GB through tiles: {written / tiles:.0f}× less")


def decode_bound() -> Found:
    """By data sheet alone: what an eager step costs the host beside is the engine's own matter."""
    edge = balance(find_device("h100-80gb"))
    rows = []
    for name in ("llama-2-7b", "llama-2-70b"):
        model = find_model(name)
        ends = next((batch for batch in range(1, 4096) if decoding(model, batch, 128).arithmetic_intensity >= edge), None)
        long = decoding(model, 256, 4096).arithmetic_intensity
        until = f"from batch {ends} on arithmetic binds" if ends else "it binds at every batch"
        rows.append(
            (ends, f"{name}: {decoding(model).arithmetic_intensity:.1f} operations a byte at batch 1, {until} at 128 tokens each, {long:.0f} at 256 × 4,096")
        )
    text = f"; the H100 wants {edge:.0f}. ".join(("; ".join(row for _, row in rows), "")).strip()
    return Found(CONFIRMED if all(ends is None for ends, _ in rows) else HOLDS_IF, f"batches are small or contexts long. {text}")


def ratios_quoted() -> Found:
    a100, h100 = 1935 / 312, 3350 / 989
    ours = {name: 1000 / balance(find_device(name)) for name in ("a100-80gb", "h100-80gb")}
    text = ", ".join(f"{name} {ratio:.2f} GB/s per TFLOP/s" for name, ratio in ours.items())
    return judged(near(a100, 6.2, 0.02) and near(h100, 3.4, 0.02), f"{a100:.2f} and {h100:.2f} as quoted (A100 PCIe); our table's SXM cards: {text}")


def more_compute_bound() -> Found:
    found = {name: balance(find_device(name)) for name in ("a100-80gb", "h100-80gb")}
    text = ", ".join(f"{name} {edge:.0f}" for name, edge in found.items())
    return judged(
        found["h100-80gb"] < found["a100-80gb"], f"operations a byte to keep the cores busy: {text}: the same work is bound by memory sooner on the H100"
    )


def headroom() -> Found:
    decode = decoding(find_model("llama-2-7b")).arithmetic_intensity
    found = {name: balance(find_device(name)) / decode for name in ("a100-80gb", "h100-80gb")}
    return judged(
        found["h100-80gb"] > found["a100-80gb"], "compute left idle beside decode at batch 1: " + ", ".join(f"{name} {x:.0f}×" for name, x in found.items())
    )


def minimal_compute() -> Found:
    from tradespace.spec.what_if import what_if

    model = find_model("llama-2-7b")
    whole, grouped = decoding(all_heads(model)), decoding(what_if(model, kv_heads=8))
    return judged(
        grouped.flops <= whole.flops, f"operations of a token {grouped.flops / whole.flops:.3f} of before, bytes {grouped.read_bytes / whole.read_bytes:.3f}"
    )


def decode_intensity() -> Found:
    found = decoding(find_model("llama-2-7b")).arithmetic_intensity
    return judged(0.9 <= found <= 2.1, f"{found:.2f} operations a byte")


def reach() -> Found:
    found = {}
    for name in ("llama-2-7b", "gemma-3-27b"):
        windows = [layer.mixer.window for layer in find_model(name).layers if isinstance(layer.mixer, Attention)]
        narrow = min((w for w in windows if w is not None), default=None)
        found[name] = (
            "all layers see all"
            if narrow is None
            else f"{sum(w is not None for w in windows)} of {len(windows)} layers see the last {narrow:,}, {narrow / LONG:.1%} of 32K"
        )
    return Found(HOLDS_IF, "a layer has no window: " + "; ".join(f"{name}: {text}" for name, text in found.items()))


def mixture_experts() -> Found:
    rows = {}
    for name, (total, active) in mixture_parts().items():
        routed = next(layer.ffn for layer in find_model(name).layers if isinstance(layer.ffn, RoutedFFN))
        rows[name] = (routed.top_k, routed.E, active / total)
    text = ", ".join(f"{name} {k} of {E}, {share:.0%} active" for name, (k, E, share) in rows.items())
    return Found(CONFIRMED if all(k <= 2 for k, _, _ in rows.values()) else HOLDS_IF, f"experts are few and large: {text}; all of them must be held")


def sparse_pairs(pattern: BlockSparse | Selected, n: int) -> int:
    """Query-key pairs of whole blocks; the diagonal's upper half is counted, too."""
    blocks = n // pattern.block
    kept = sum(len(pattern.blocks_of(i)) if isinstance(pattern, BlockSparse) else pattern.kept_of(i) for i in range(blocks))
    return kept * pattern.block**2


def sparse_cost() -> Found:
    lengths = (4096, 16_384, 65_536)
    fixed, share = ([(n, sparse_pairs(pattern, n)) for n in lengths] for pattern in (BlockSparse(), Selected(share=0.1)))
    powers = exponent(fixed), exponent(share)
    text = f"pairs grow as n^{powers[0]:.2f} with {BlockSparse().describe()}, as n^{powers[1]:.2f} with a fixed share: linear or quadratic, no logarithm"
    return judged(1.04 <= powers[0] <= 1.2, text)


def missed_links() -> Found:
    pattern = BlockSparse()
    seen = len(pattern.blocks_of(LONG // pattern.block - 1)) * pattern.block / LONG
    return judged(seen < 1, f"the last block of 32K tokens sees {seen:.1%} of what came before in one layer ({pattern.describe()})")


def snippets() -> Found:
    from tradespace.lab.snippets import SNIPPETS, fails

    wrong = {name: why for name in SNIPPETS if (why := fails(name)) is not None}
    return judged(not wrong, f"{len(wrong)} of {len(SNIPPETS)} fail: " + "; ".join(f"{name}: {why}" for name, why in wrong.items()))


RATES: dict[int, Callable[[], Found]] = {
    19: dense_cost,
    40: binding,
    42: williams,
    45: snippets,
    46: reads_of_cache,
    58: fused_traffic,
    62: decode_bound,
    80: minimal_compute,
    89: ratios_quoted,
    90: more_compute_bound,
    95: decode_intensity,
    109: headroom,
    110: reach,
    115: mixture_experts,
    118: sparse_cost,
    119: missed_links,
}
