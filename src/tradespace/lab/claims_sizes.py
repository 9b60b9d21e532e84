"""Claims about bytes that our own spec and cost functions decide: weights, caches, matrices of scores, states of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt

from tradespace.cost.formulas import attention_matrix_bytes, kv_cache_bytes, training_bytes
from tradespace.cost.memory import ledger
from tradespace.lab.claims_found import CONFIRMED, HOLDS_IF, Found, judged, near
from tradespace.spec.attention import chunk_size
from tradespace.spec.device_zoo import find_device
from tradespace.spec.formats import FORMATS
from tradespace.spec.kv import Retain, layer_token_bytes, token_bytes
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import KVPlan, Plan
from tradespace.spec.tensors import QUANTIZABLE_ROLES, TensorSpec, active_parameters, model_tensors, num_parameters
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.spec.what_if import what_if
from tradespace.spec.zoo import find_model
from tradespace.units import GiB, KiB, MiB

GB, MB = 1e9, 1e6


def heads_of(model: ModelSpec) -> tuple[int, int]:
    """(query heads, KV heads) of the first layer."""
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Attention), f"{model.name}: asked for a model with softmax attention"
    return mixer.N, mixer.K


def all_heads(model: ModelSpec) -> ModelSpec:
    """The model with as many KV heads as query heads."""
    return what_if(model, kv_heads=heads_of(model)[0])


def square_bytes(format_name: str) -> int:
    """A 4096 × 4096 weight with its scales."""
    return FORMATS[format_name].nbytes((4096, 4096))


def score_matrix() -> Found:
    held = {size: attention_matrix_bytes(32_768, 32_768, element_bytes=size) for size in (4, 2)}
    return Found(
        HOLDS_IF,
        f"one head of one layer in fp32: {held[4] / GiB:g} GiB ({held[4] / GB:.2f} GB); in 16 bits {held[2] / GiB:g} GiB; times heads, where all are held",
    )


def gpt3_context() -> Found:
    model = find_model("gpt-3-175b")
    N, _ = heads_of(model)
    scores, weights = attention_matrix_bytes(2048, 2048, heads=N, element_bytes=2), weight_bytes(model, WeightPlan(default="fp16"))
    equal = sqrt(weights / (N * 2))
    return judged(
        scores >= weights,
        f"scores of a layer at 2,048 tokens: {scores / GB:.2f} GB, {scores / weights:.2%} of the weights ({weights / GB:.0f} GB); equal at {equal:,.0f} tokens",
    )


def cache_70b() -> Found:
    model = find_model("llama-2-70b")
    own, full = (kv_cache_bytes(m, 32_768) / GB for m in (model, all_heads(model)))
    weights = weight_bytes(model, WeightPlan(default="fp16")) / GB
    return judged(
        any(near(x, 140, 0.05) for x in (own, full)), f"{own:.1f} GB with its 8 KV heads, {full:.1f} GB with 64; {weights:.0f} GB are its weights in fp16"
    )


def multi_query() -> Found:
    found = {name: heads_of(find_model(name))[0] for name in ("gpt2", "llama-2-7b", "llama-2-70b", "falcon-7b", "starcoder", "gpt-3-175b")}
    text = ", ".join(f"{name} {heads}" for name, heads in found.items())
    inside = all(8 <= heads <= 32 for heads in found.values())
    return Found(CONFIRMED if inside else HOLDS_IF, f"the model has 8 to 32 query heads: the factor is their number ({text})")


def grouped_query() -> Found:
    model = find_model("llama-2-70b")
    N, _ = heads_of(model)
    whole = token_bytes(all_heads(model), "fp16")
    ratios = {group: whole / token_bytes(what_if(model, kv_heads=N // group), "fp16") for group in (4, 8)}
    return judged(
        all(ratio == group for group, ratio in ratios.items()),
        "the factor is the group's size: " + ", ".join(f"{g} heads a group {r:g}×" for g, r in ratios.items()),
    )


def square_weight() -> Found:
    found = {name: square_bytes(name) / MiB for name in ("fp32", "int8", "int4")}
    holds = all(near(found[name], size, 0.05) for name, size in (("fp32", 64), ("int8", 16), ("int4", 8)))
    return judged(
        holds,
        ", ".join(f"{name} {size:.2f} MiB" for name, size in found.items()) + f"; in groups of 128 {square_bytes('int4-g128') / MiB:.2f} MiB, scales included",
    )


def adapter() -> Found:
    held = 2 * 4096 * 16 * 4
    return Found(HOLDS_IF, f"held in fp32: {held / KiB:.0f} KiB; in 16 bits {held / 2 / KiB:.0f} KiB")


def per_token() -> Found:
    gpt3 = token_bytes(find_model("gpt-3-175b"), "fp16") / MB
    return judged(near(gpt3, 350, 1.0) and gpt3 > 175, f"GPT-3: {gpt3:.2f} MB a token (350 GB are its weights in fp16); GPT-4's shape is not published")


def llama_weights(name: str, expected: tuple[float, float, float]) -> Found:
    formats = ("fp32", "int8", "int4-g128")
    model = find_model(name)
    found = [weight_bytes(model, WeightPlan(default=format_name)) / GB for format_name in formats]
    return judged(
        all(near(have, want, 0.05) for have, want in zip(found, expected, strict=True)),
        ", ".join(f"{f} {x:.2f} GB" for f, x in zip(formats, found, strict=True)),
    )


def adapters(model: ModelSpec, rank: int) -> int:
    """Numbers in adapters on every matrix of the layers."""

    def factors(tensor: TensorSpec) -> int:
        return rank * (tensor.shape[-1] + tensor.shape[-2])

    return sum(factors(t) for t in model_tensors(model) if t.role in QUANTIZABLE_ROLES and t.role not in ("embed", "lm_head"))


def qlora() -> Found:
    model = find_model("llama-2-70b")
    weights = weight_bytes(model, WeightPlan(default="nf4")) / GB
    trained = training_bytes(adapters(model, 16)) / GB
    return judged(
        weights + trained <= 35,
        f"weights in nf4 {weights:.1f} GB, adapters with gradients and AdamW {trained:.1f} GB: {weights + trained:.1f} GB before activations",
    )


def gradients() -> Found:
    return judged(False, "one number per parameter: 1× in the weights' own format, 2× only where fp32 gradients stand beside 16-bit weights")


def optimizer() -> Found:
    found = {"fp32 weights": 8 / 4, "16-bit weights": 8 / 2, "16-bit weights, master copy": 12 / 2, "against fp32, master copy": 12 / 4}
    return Found(HOLDS_IF, "it is counted in models of fp32: " + ", ".join(f"{name} {ratio:g}×" for name, ratio in found.items()))


def training() -> Found:
    each = training_bytes(1)
    return Found(
        HOLDS_IF, f"it means bytes per parameter, not multiples of the model: {each} bytes of states, {each / 2:g} times the 16-bit model, activations beside"
    )


def inference_only_weights() -> Found:
    model = find_model("llama-2-7b")
    cache, weights = kv_cache_bytes(model, 4096, 16), weight_bytes(model, WeightPlan(default="fp16"))
    return judged(cache < 0.05 * weights, f"16 sequences of 4,096: cache {cache / GB:.1f} GB, {cache / weights:.1f} times the weights ({weights / GB:.1f} GB)")


def blocks() -> Found:
    from tradespace.kernels.attention.triton_flash_tiles import find_shipped

    tiles = find_shipped("sm90", "forward", 128)
    sizes = {n: chunk_size(n) for n in (1024, 16_384)}
    return Found(
        HOLDS_IF,
        f"the kernel is Rabe and Staats': {sizes[1024]} keys at 1,024 tokens, {sizes[16_384]} at 16,384. Flash tiles are {tiles.M} × {tiles.N} at any length",
    )


def simulation_cache() -> Found:
    layer = 2 * 768 * 4
    found = [tokens * layer / MiB for tokens in (2048, int(4 * sqrt(2048)), 8)]
    return judged(
        all(near(have, want, 0.1) for have, want in zip(found, (12, 1.1, 0.05), strict=True)),
        ", ".join(f"{x:.3g} MiB" for x in found) + ": a window of 4√n tokens is meant by √n, of 8 by constant",
    )


def sliding() -> Found:
    retain = Retain(kind="sliding", window=1024)
    kept = [retain.tokens(length) for length in (4096, 65_536)]
    return judged(kept[0] == kept[1], f"{kept[0]:,} tokens kept at 4,096 and {kept[1]:,} at 65,536")


def fp16_70b() -> Found:
    held = weight_bytes(find_model("llama-2-70b"), WeightPlan(default="fp16")) / GB
    return judged(near(held, 140, 0.05), f"{held:.1f} GB")


def crossing(names: tuple[str, ...]) -> tuple[dict[str, float], str, bool]:
    """Tokens at which the cache takes as much as the weights, as numbers and as a sentence, and whether that lies inside every context."""
    models = {name: find_model(name) for name in names}
    found = {name: weight_bytes(m, WeightPlan(default="fp16")) / token_bytes(m, "fp16") for name, m in models.items()}
    text = ", ".join(f"{name} {tokens:,.0f} (context {models[name].max_context:,})" for name, tokens in found.items())
    return found, text, all(tokens <= models[name].max_context for name, tokens in found.items())


def cache_largest() -> Found:
    _, text, inside = crossing(("llama-2-7b", "llama-2-70b", "mistral-7b-v0.1"))
    return Found(CONFIRMED if inside else HOLDS_IF, f"sequences · tokens exceed: {text}")


def cache_formula() -> Found:
    rows = []
    for name in ("llama-2-7b", "llama-2-70b"):
        model = find_model(name)
        mixer = model.layers[0].mixer
        assert isinstance(mixer, Attention)
        true = kv_cache_bytes(model, 4096, 16)
        rows.append((name, *(2 * 16 * 4096 * model.L * heads * mixer.H * 2 / true for heads in (mixer.N, mixer.K))))
    text = "; ".join(f"{name}: with query heads {with_n:g}× the true size, with KV heads {with_k:g}×" for name, with_n, with_k in rows)
    return Found(HOLDS_IF, f"H counts KV heads and every layer looks at everything. {text}")


def activation_share() -> Found:
    model = find_model("llama-2-7b")
    plan = Plan(
        model=model.name, weights=WeightPlan(default="fp16"), kv=KVPlan(store="fp16"), max_sequences=8, max_context=4096, kv_tokens=8 * 4096, attention="flash"
    )
    found = ledger(model, plan, find_device("h100-80gb"))
    share = sum(line.bytes.require() for line in found.lines if line.name == "workspace") / found.total_bytes().require()
    return judged(0.05 <= share <= 0.10, f"workspace {share:.1%} of {found.total_bytes().require() / GB:.1f} GB (steps of {plan.step_tokens} tokens)")


def int8_cache() -> Found:
    ratios = {H: 16 * H / (8 * H + 16) for H in (64, 128, 256)}
    model = find_model("llama-2-7b")
    exact = token_bytes(model, "fp16") / token_bytes(model, "int8")
    return judged(
        all(near(r, 2, 0.05) for r in ratios.values()),
        ", ".join(f"heads of {H} {r:.3f}×" for H, r in ratios.items()) + f"; Llama-2-7B {exact:.3f}×, scales included",
    )


def named_multi_query() -> Found:
    found = {name: heads_of(find_model(name)) for name in ("falcon-7b", "starcoder")}
    return judged(all(near(N / K, 32, 0.1) for N, K in found.values()), ", ".join(f"{name} {N / K:g}×" for name, (N, K) in found.items()))


def named_grouped_query() -> Found:
    found = {name: heads_of(find_model(name)) for name in ("llama-2-7b", "llama-2-70b", "mistral-7b-v0.1")}
    text = ", ".join(f"{name} {N / K:g}×" for name, (N, K) in found.items())
    return Found(CONFIRMED if all(N / K == 4 for N, K in found.values()) else HOLDS_IF, f"the model is Mistral's: {text}")


def no_activations() -> Found:
    model = find_model("llama-2-7b")
    sizes = []
    for layers in (32, 64):
        deep = replace(model, layers=model.layers * (layers // 32))
        plan = Plan(model=deep.name, weights=WeightPlan(default="fp16"), kv=KVPlan(store="fp16"), attention="flash")
        sizes.append(sum(line.bytes.require() for line in ledger(deep, plan, find_device("h100-80gb")).lines if line.name == "workspace"))
    return judged(sizes[0] == sizes[1], f"workspace of a step: {sizes[0] / MiB:.0f} MiB with 32 layers, {sizes[1] / MiB:.0f} MiB with 64: nothing to recompute")


def width() -> Found:
    model = find_model("llama-2-7b")
    shapes = {D: what_if(model, width=D, equal_parameters=True) for D in (2048, 4096, 6144)}
    text = "; ".join(
        f"width {D}: {m.L} layers, {num_parameters(m) / GB:.2f}B parameters, {token_bytes(m, 'fp16') / KiB:.0f} KiB a token" for D, m in shapes.items()
    )
    held = [token_bytes(m, "fp16") for m in shapes.values()]
    return judged(held == sorted(held, reverse=True), text + ": at equal parameters width takes cache, not weights")


def feed_forward() -> Found:
    model = find_model("llama-2-7b")
    small = what_if(model, ffn_ratio=2.0)
    have, less = (weight_bytes(m, WeightPlan(default="fp16")) / GB for m in (model, small))
    return judged(less < have, f"{have:.2f} GB to {less:.2f} GB")


def mixture_parts() -> dict[str, tuple[float, float]]:
    """(parameters, active parameters) in thousands of millions."""
    return {name: (num_parameters(m) / GB, active_parameters(m) / GB) for name in ("mixtral-8x7b", "deepseek-v3", "gpt-oss-120b") for m in [find_model(name)]}


def mixture_active() -> Found:
    total, active = mixture_parts()["mixtral-8x7b"]
    return judged(near(active, total / 8, 0.1), f"Mixtral-8x7B: {active:.1f}B active of {total:.1f}B, not {total / 8:.1f}B; and all {total:.1f}B must be held")


def mixture_larger() -> Found:
    found = {name: total / active for name, (total, active) in mixture_parts().items()}
    return Found(
        CONFIRMED if all(r >= 10 for r in found.values()) else HOLDS_IF,
        "experts are many and small: " + ", ".join(f"{name} {r:.1f}×" for name, r in found.items()),
    )


def mixture_compute() -> Found:
    total, active = mixture_parts()["mixtral-8x7b"]
    dense = num_parameters(find_model("mistral-7b-v0.1")) / GB
    return judged(near(active, dense, 0.1), f"Mixtral-8x7B over Mistral-7B: {total / dense:.1f} times the parameters, {active / dense:.2f} times the compute")


def batch_cache() -> Found:
    model = find_model("llama-2-70b")
    one, many, full = kv_cache_bytes(model, 4096) / GB, kv_cache_bytes(model, 4096, 16) / GB, kv_cache_bytes(all_heads(model), 4096, 16) / GB
    holds = near(one, 1, 0.05) and near(many, 16, 0.05) and near(full, 128, 0.05)
    each = layer_token_bytes(model, 0, KVPlan(store="fp16"))
    return judged(holds, f"{one:.2f} GB a sample, {many:.1f} GB for 16, {full:.0f} GB with 64 heads ({each} bytes a token and layer)")


def planned_70b() -> Found:
    from tradespace import api

    frontier = api.plan("llama-2-70b", memory="40GB", device="a100-40gb", context=2048)
    best = frontier.best
    return judged(best is not None, "no plan fits" if best is None else f"fits: {best.plan.describe()}, {best.bytes_each / GB:.1f} GB")


SIZES: dict[int, Callable[[], Found]] = {
    2: score_matrix,
    6: gpt3_context,
    9: cache_70b,
    10: multi_query,
    11: grouped_query,
    13: square_weight,
    15: adapter,
    20: mixture_active,
    21: mixture_larger,
    23: per_token,
    24: lambda: llama_weights("llama-2-7b", (28, 7, 3.5)),
    25: lambda: llama_weights("llama-2-70b", (280, 70, 35)),
    26: qlora,
    29: gradients,
    30: optimizer,
    32: training,
    33: inference_only_weights,
    37: blocks,
    49: simulation_cache,
    59: sliding,
    61: fp16_70b,
    63: cache_largest,
    64: cache_formula,
    65: activation_share,
    74: int8_cache,
    78: named_multi_query,
    79: named_grouped_query,
    84: no_activations,
    86: width,
    87: feed_forward,
    88: mixture_compute,
    94: planned_70b,
    99: batch_cache,
    107: cache_largest,
}
