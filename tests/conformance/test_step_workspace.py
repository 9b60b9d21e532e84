"""The ledger's moments of a step against torch's own record of allocations: small models of several shapes, every format that runs, steps that fill up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conformance.test_attention_workspace import peak_bytes
from tradespace.cost import workspace
from tradespace.cost.summary import product_shapes, summarize
from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.sampler import Sampler, SampleRow
from tradespace.formats import FORMATS, int8, quantized
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import KVCache
from tradespace.model.transformer import Transformer
from tradespace.spec import products
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan

HEADS = Attention(N=4, K=2, H=32, rope=Rope(dims=32))
MODELS = {
    "plain": ((LayerSpec(mixer=replace(HEADS, N=8), ffn=DenseFFN(F=512)),), 256, 2048),
    "wide": ((LayerSpec(mixer=replace(HEADS, N=16, K=4), ffn=DenseFFN(F=2048)),), 512, 4096),
    "narrow feed-forward": ((LayerSpec(mixer=replace(HEADS, N=8, K=8), ffn=DenseFFN(F=128)),), 256, 2048),
    "sandwich": ((LayerSpec(mixer=replace(HEADS, qk_norm="head", N=8), ffn=DenseFFN(F=512, activation="gelu_tanh"), arrangement="sandwich"),), 128, 2048),
    "parallel": ((LayerSpec(mixer=replace(HEADS, K=1), ffn=DenseFFN(F=1024, activation="gelu", gated=False), arrangement="parallel"),), 256, 2048),
    "much vocabulary": ((LayerSpec(mixer=HEADS, ffn=DenseFFN(F=128)),), 256, 2**14),
}
DRAWN = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=0)


def build(name: str, weights: WeightPlan, plan: Plan) -> tuple[ModelSpec, Transformer, KVCache]:
    layers, D, V = MODELS[name]
    spec = ModelSpec(name=name, family="llama", D=D, V=V, layers=layers * 2, max_context=1024)
    torch.manual_seed(0)
    transformer = Transformer(spec, weights, attention=plan.attention, linear=plan.linear, max_context=plan.max_context)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data.copy_(torch.zeros_like(tensor)) if tensor.dtype.itemsize == 1 else tensor.data.normal_(std=0.02)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[weights.dense]
    cache = KVCache(spec, plan.kv, num_blocks=plan.max_sequences, block_size=plan.max_context, dtype=dtype)
    return spec, transformer, cache


@torch.inference_mode()
def measured(spec: ModelSpec, transformer: Transformer, cache: KVCache, plan: Plan) -> tuple[int, int]:
    """Peaks of (the layers, the head and sampling) over a full prefill step and a step of all sequences, once everything that is kept is there."""
    worst = [0, 0]
    for spans in (
        [Span(0, plan.step_tokens, plan.max_context, (0,))],
        [Span(row, 1, plan.max_context, (row,)) for row in range(plan.max_sequences)],
    ):
        ids, positions = torch.zeros(spans[-1].query_start + spans[-1].num_queries, dtype=torch.int64), positions_of(spans)
        rows = torch.arange(min(plan.max_sequences, len(ids)))
        request = Request(id="r", prompt_ids=(0,) * 8, params=DRAWN)

        def layers(spans=spans, ids=ids, positions=positions) -> torch.Tensor:
            return transformer(ids, positions, StepBatch.from_spans(spans, block_size=plan.max_context), cache)

        hidden_TD = layers()
        logits_RV = transformer.logits(hidden_TD, rows)
        worst[0] = max(worst[0], peak_bytes(layers))
        worst[1] = max(worst[1], hidden_TD.nbytes + peak_bytes(lambda h=hidden_TD, rows=rows: transformer.logits(h, rows)))
        asked = [SampleRow(request, ())] * len(rows)
        sampling = peak_bytes(lambda x=logits_RV, asked=asked: Sampler().sample(x, asked))
        worst[1] = max(worst[1], logits_RV.nbytes + sampling)
    return worst[0], worst[1]


def check(name: str, weights: WeightPlan, *, sequences: int = 4, attention: str = "sdpa", linear: str = "torch", loose: float = 1.25) -> None:
    store = weights.dense
    kv = KVPlan(layout="contiguous", store=store)
    plan = Plan(
        model=name, weights=weights, kv=kv, attention=attention, linear=linear, max_sequences=sequences, max_context=512, step_tokens=256, kv_tokens=512
    )
    spec, transformer, cache = build(name, weights, plan)
    shape, summary = workspace.step_shape(plan, threads=1), summarize(spec)
    found = measured(spec, transformer, cache, plan)
    booked = workspace.activation_bytes(summary, weights, shape), workspace.head_bytes(summary, weights, shape)
    slack = 2**19  # tensors of a few rows, masks, ids
    if weights.default not in ("fp32", "bf16", "fp16"):  # and what a codec holds for the elements that it decodes at a time
        slack += quantized.DECODE_ELEMENTS * (quantized.DECODE_BYTES_PER_ELEMENT + 4)
    for what, was, formula in zip(("layers", "head"), found, booked, strict=True):
        assert was <= formula + slack, f"{what} held {was:,} bytes; the formula books {formula:,}"
        assert formula <= loose * was + slack, f"{what} held {was:,} bytes; the formula books {formula:,}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "wide"])
def test_dense_steps(name, dtype):
    check(name, WeightPlan(default=dtype), sequences=1)
    # several sequences' keys in one padded block: how much of it is padding depends on their lengths, and the ledger books the most
    check(name, WeightPlan(default=dtype), sequences=24, loose=2.5)


@pytest.mark.parametrize("name", ["wide", "sandwich", "much vocabulary"])
@pytest.mark.parametrize("sequences", [4, 24])
def test_int8_steps(name, sequences):
    check(name, WeightPlan(default="int8"), sequences=sequences, loose=2.5)


@pytest.mark.parametrize("fmt", [name for name in FORMATS if name not in ("fp32", "bf16", "fp16", "int8")])
def test_every_coded_format(fmt):
    check("wide", WeightPlan(default=fmt))


@pytest.mark.parametrize("attention", ["chunked", "reference"])
def test_other_attention(attention):
    check("narrow feed-forward", WeightPlan(default="bf16"), attention=attention, loose=1.4)


def test_the_fused_product_of_int8_is_where_the_spec_says():
    assert (products.INT8_FUSED_ROWS, products.INT8_FUSED_COLUMNS) == (int8.FUSED_ROWS, int8.FUSED_COLUMNS)


def test_products_are_those_that_a_step_makes(monkeypatch):
    """Every dense product of steps of all sizes has a shape that the ledger counts."""
    from tradespace.kernels.linear import LINEAR
    from tradespace.spec.buckets import bucket

    seen: set[tuple[int, int, int]] = set()
    real = LINEAR["torch"]

    def spy(x_TC, weight_RC, bias_R=None):
        seen.add((*weight_RC.shape, bucket(len(x_TC))))
        return real(x_TC, weight_RC, bias_R)

    spy.__module__ = real.__module__
    monkeypatch.setitem(LINEAR, "torch", spy)
    weights = WeightPlan(default="int8")
    plan = Plan(model="plain", weights=weights, kv=KVPlan(layout="contiguous"), max_sequences=16, max_context=512, step_tokens=256, kv_tokens=512)
    spec, transformer, cache = build("plain", weights, plan)
    with torch.inference_mode():
        for tokens in (1, 5, 12, 13, 40, 256):
            span = Span(0, tokens, tokens, (0,))
            hidden_TD = transformer(torch.zeros(tokens, dtype=torch.int64), positions_of([span]), StepBatch.from_spans([span], block_size=512), cache)
            transformer.logits(hidden_TD, torch.arange(min(tokens, 16)))
    layers, head = product_shapes(summarize(spec), weights)
    counted = {(R, C, above) for R, C, above in layers | head}
    assert seen and all(any((rows, columns) == (R, C) and above < T for rows, columns, above in counted) for R, C, T in seen)
    assert {(R, C) for R, C, _ in counted} == {(R, C) for R, C, _ in seen}
