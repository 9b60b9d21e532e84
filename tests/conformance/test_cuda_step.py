"""A model's step on a CUDA device against the fp32 reference of the same (decoded) weights, and its bytes against the spec. Under Triton's interpreter here."""

from __future__ import annotations

import os

import pytest
import torch

from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import KVCache
from tradespace.loading.random_weights import fill_random
from tradespace.model.transformer import Transformer
from tradespace.spec import cuda
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.spec.weights import WeightPlan

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter (conftest.py sets TRITON_INTERPRET=1)")
torch.set_num_threads(1)

from tradespace.model.cuda_step import DeviceStep, Inputs  # noqa: E402

V, CONTEXT, BLOCK, STEP = 60, 96, 16, 72
BLOCKS = (3, 1, 5, 0, 2)


def model(arrangement: str = "pre", qk_norm: str = "none", gated: bool = True) -> ModelSpec:
    mixer = Attention(N=4, K=2, H=16, rope=Rope(dims=16), qk_norm=qk_norm)  # pyright: ignore[reportArgumentType]
    layer = LayerSpec(mixer=mixer, ffn=DenseFFN(F=64, gated=gated), arrangement=arrangement)  # pyright: ignore[reportArgumentType]
    return ModelSpec(name="tiny", family="llama", D=32, V=V, layers=(layer, layer), max_context=256, tied=False)


def inputs(spans: list[Span], tokens: list[int], rows: list[int], singles: int = 0) -> Inputs:
    batch = StepBatch.from_spans(spans, block_size=BLOCK)
    held = batch.slots_T, batch.query_starts_B1, batch.lengths_B, batch.block_tables_BM
    return Inputs(torch.tensor(tokens), positions_of(spans), *held, torch.tensor(rows, dtype=torch.int64), singles=singles)


@pytest.mark.parametrize(
    ("spec", "weights", "store", "tolerance", "coded_rows"),
    [
        (model(), "bf16", "bf16", 0.02, 128),
        (model(qk_norm="head"), "int8", "int8", 0.03, 128),
        (model(qk_norm="head"), "int8", "int8", 0.03, 64),
        (model("sandwich"), "int4-g32", "fp8", 0.08, 128),
        (model("sandwich"), "int4-g32", "fp8", 0.08, 64),
        (model(gated=False), "fp8-a8", "bf16", 0.08, 128),
    ],
    ids=["plain bf16", "head norms int8", "int8 decoded", "sandwich int4", "int4 decoded", "ungated fp8 activations"],
)
def test_logits_are_those_of_the_reference(spec, weights, store, tolerance, coded_rows, monkeypatch):
    """A chunk of many tokens (codes: in two passes, or decoded), one of few beside another sequence's decode, then a decode step: as far off as bf16 and the
    cache's codes are."""
    monkeypatch.setattr(cuda, "CODED_ROWS", coded_rows)
    plan = WeightPlan(default=weights, exceptions={"embed": "bf16"}, layout="cuda")
    transformer = Transformer(spec, plan, attention="paged", linear="cuda", max_context=CONTEXT)
    fill_random(transformer, seed=1)
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    reference = Transformer(spec, WeightPlan(default="fp32"), attention="reference", linear="reference", max_context=CONTEXT)
    for tensor in model_tensors(spec):
        stem, kind = tensor.name.rsplit(".", 1)
        module, own = transformer.get_submodule(stem), reference.get_submodule(stem)
        if hasattr(module, "dense_rows"):
            own.set_rows(slice(0, tensor.shape[0]), module.dense_rows(0, tensor.shape[0]).float() * 4)  # stronger than drawn: logits that tell tokens apart
            module.packed.scale.mul_(4) if module.packed.scale is not None else module.packed.codes.mul_(4)
        else:
            getattr(own, kind).data.copy_(getattr(module, kind))
    kv = KVPlan(store=store, block_size=BLOCK)
    cache = KVCache(spec, kv, num_blocks=12, block_size=BLOCK, dtype=torch.bfloat16, device="cpu", max_sequences=3, max_context=CONTEXT)
    step = DeviceStep(transformer, step_tokens=STEP, logit_rows=3, max_sequences=3, max_context=CONTEXT)
    step.bind(cache)
    ids = torch.randint(0, V, (78,), generator=torch.Generator().manual_seed(2))
    tokens = ids.tolist()
    with torch.inference_mode():
        expected = reference.logits(reference.forward(ids, torch.arange(78), StepBatch.packed([78])))
        other = reference.logits(reference.forward(ids[:2], torch.arange(2), StepBatch.packed([2])))
        step.run(inputs([Span(0, 68, 68, BLOCKS)], tokens[:68], []), decodes=False)  # a chunk of which nothing is sampled can still be scored
        scored_RV = step.logits_of(torch.tensor([3, 66])).clone()
        found = [step.run(inputs([Span(0, 68, 68, BLOCKS)], tokens[:68], [67]), decodes=False)[0].clone()]
        step.run(inputs([Span(0, 1, 1, (7,))], tokens[:1], [0]), decodes=True)
        two = step.run(inputs([Span(0, 1, 2, (7,)), Span(1, 9, 77, BLOCKS)], [tokens[1], *tokens[68:77]], [0, 9], singles=1), decodes=False).clone()
        found += [two[1], step.run(inputs([Span(0, 1, 78, BLOCKS)], tokens[77:], [0]), decodes=True)[0].clone(), two[0]]
    for logits_V, expected_V in zip([*scored_RV, *found], (*expected[[3, 66, 67, 76, 77]], other[1]), strict=True):
        off = float((logits_V - expected_V).abs().max() / expected_V.abs().max())
        assert off <= tolerance, off


def test_bytes_are_the_spec_s():
    spec = model()
    for weights in ("bf16", "fp8-a8", "nf4"):
        transformer = Transformer(spec, WeightPlan(default=weights, layout="cuda"), attention="paged", linear="cuda", max_context=CONTEXT)
        step = DeviceStep(transformer, step_tokens=STEP, logit_rows=5, max_sequences=5, max_context=CONTEXT)
        assert step.nbytes + step.scratch.nbytes == cuda.step_bytes(spec, (weights,), STEP, 5, 5, CONTEXT, multiprocessors=4)
