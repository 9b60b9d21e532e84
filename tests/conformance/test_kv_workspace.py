"""What a step holds beside weights and cache, for caches that must be decoded, chosen from or rebuilt: the ledger's formula against torch's allocations."""

from __future__ import annotations

import pytest
import torch

from conformance.test_attention_workspace import peak_bytes
from tradespace.cost import workspace
from tradespace.cost.summary import summarize
from tradespace.kernels.attention.dispatch import resolve_kernels
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import KVCache
from tradespace.model.rebuild import Rebuilding
from tradespace.model.transformer import Transformer
from tradespace.spec.kv import KVPlan, Retain
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan

LAYER = LayerSpec(mixer=Attention(N=8, K=4, H=32, rope=Rope(dims=32)), ffn=DenseFFN(F=256))
SPEC = ModelSpec(name="small", family="llama", D=256, V=512, layers=(LAYER, LAYER), max_context=1024)
CONTEXT, STEP, SEQUENCES = 1024, 128, 3
CACHES = {
    "int8": (KVPlan(store="int8"), "sdpa"),
    "fp8 contiguous": (KVPlan(store="fp8", layout="contiguous"), "chunked"),
    "int4": (KVPlan(store="int4"), "reference"),
    "int2": (KVPlan(store="int2", block_size=64), "sdpa"),
    "x-int8": (KVPlan(store="x-int8"), "sdpa"),
    "x-fp32": (KVPlan(store="x-fp32"), "chunked"),
    "sliding": (KVPlan(store="fp32", retain=Retain(kind="sliding", window=500, sinks=4)), "sdpa"),
    "sliding int8": (KVPlan(store="int8", retain=Retain(kind="sliding", window=500, sinks=4)), "chunked"),
    "h2o": (KVPlan(store="fp32", retain=Retain(kind="h2o", budget=600)), "chunked"),
    "snapkv": (KVPlan(store="int8", retain=Retain(kind="snapkv", budget=600)), "reference"),
    "recent": (KVPlan(store="fp32", retain=Retain(kind="recent", recent=32)), "sdpa"),
    "ids only": (KVPlan(store="fp32", retain=Retain(kind="recent")), "chunked"),
}


@pytest.mark.parametrize("name", list(CACHES))
def test_no_step_holds_more_than_the_ledger_books(name):
    kv, attention = CACHES[name]
    weights = WeightPlan(default="fp32")
    size = kv.block_slots(CONTEXT)
    each = max(1, -(-kv.retain.tokens(CONTEXT) // size))
    plan = Plan(
        model="small", weights=weights, kv=kv, attention=attention, max_sequences=SEQUENCES, max_context=CONTEXT, step_tokens=STEP,
        kv_tokens=SEQUENCES * each * size,
    )  # fmt: skip
    transformer = Transformer(SPEC, weights, attention=resolve_kernels(SPEC, attention, torch.float32, weights=kv.retain.evicts), max_context=CONTEXT)
    for tensor in transformer.parameters():
        tensor.data.normal_(std=0.02)
    cache = KVCache(SPEC, kv, num_blocks=SEQUENCES * each, block_size=size, dtype=torch.float32, max_sequences=SEQUENCES, max_context=CONTEXT)
    model = Rebuilding(transformer) if kv.retain.rebuilds else transformer
    tables = [tuple(range((row + 1) * each - 1, row * each - 1, -1)) for row in range(SEQUENCES)]
    worst = 0
    for spans in ([Span(0, STEP, CONTEXT, tables[0], 0)], [Span(row, 1, CONTEXT - row, tables[row], row) for row in range(SEQUENCES)]):
        batch = StepBatch.from_spans(spans, block_size=0 if kv.places_tokens else size)
        ids, positions = torch.zeros(batch.num_tokens, dtype=torch.int64), positions_of(spans)

        def step(ids=ids, positions=positions, batch=batch):
            return model.forward(ids, positions, batch, cache)

        with torch.inference_mode():
            step()
            worst = max(worst, peak_bytes(step))
    booked = workspace.activation_bytes(summarize(SPEC), weights, workspace.step_shape(plan, threads=1))
    assert worst <= booked + 2**19, f"{name} held {worst:,} bytes; the formula books {booked:,}"
    assert booked <= 3 * worst + 2**19, f"{name} held {worst:,} bytes; the formula books {booked:,}"
