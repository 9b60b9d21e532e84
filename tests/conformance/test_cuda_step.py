"""A model's step on a CUDA device against the fp32 reference of the same (decoded) weights, and its bytes against the spec. Under Triton's interpreter here."""

from __future__ import annotations

import os
from dataclasses import replace

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
from tradespace.spec.plan import Plan
from tradespace.spec.tensors import model_tensors
from tradespace.spec.weights import WeightPlan

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter (conftest.py sets TRITON_INTERPRET=1)")
torch.set_num_threads(1)

from tradespace.engine.device_runner import DeviceRunner, Mixed  # noqa: E402
from tradespace.engine.request import Request, SamplingParams  # noqa: E402
from tradespace.engine.step import ScheduledSequence, SlotUse, Step  # noqa: E402
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


def runner_of(transformer: Transformer, weights: WeightPlan, store: str) -> DeviceRunner:
    kv = KVPlan(store=store, block_size=BLOCK)
    plan = Plan(
        model="tiny", weights=weights, kv=kv, attention="paged", linear="cuda", max_sequences=6, max_context=CONTEXT, step_tokens=96, kv_tokens=24 * BLOCK
    )  # fmt: skip
    cache = KVCache(transformer.spec, kv, num_blocks=24, block_size=BLOCK, dtype=torch.bfloat16, device="cpu", max_sequences=6, max_context=CONTEXT)
    step = DeviceStep(transformer, step_tokens=96, logit_rows=6, max_sequences=6, max_context=CONTEXT)
    step.bind(cache)
    return DeviceRunner(step, cache, plan)


@pytest.mark.parametrize(("weights", "store"), [("bf16", "bf16"), ("int8", "int8")])
def test_captured_mixed_steps_say_what_others_do(weights, store, monkeypatch):
    """Steps of prompts, chunks and decodes, padded to the tokens and sequences of a captured one, against the same steps as they are: nothing of an earlier,
    longer step is left, nobody's cache is written, and too many sequences or one that is long take no captured step."""
    monkeypatch.setattr(cuda, "MIXED_ROWS", (8, 16, 80))
    plan = WeightPlan(default=weights, exceptions={"embed": "bf16"}, layout="cuda")
    transformer = Transformer(replace(model(), layers=model().layers[:1]), plan, attention="paged", linear="cuda", max_context=CONTEXT)
    fill_random(transformer, seed=1)
    plain, captured = (runner_of(transformer, plan, store) for _ in range(2))
    replayed: list[int] = []

    def replay(rows: int) -> None:
        replayed.append(rows)
        captured._mixed(rows)

    captured.mixed_graphs = {rows: Mixed(lambda rows=rows: replay(rows), captured._mixed(rows)) for rows in cuda.mixed_rows(96)}
    assert [cuda.mixed_sequences(rows, 6) for rows in captured.mixed_graphs] == [4, 6, 6]
    ids = torch.randint(0, V, (6, CONTEXT), generator=torch.Generator().manual_seed(3)).tolist()
    requests = [Request(id=str(index), prompt_ids=tuple(ids[index]), params=SamplingParams(max_tokens=1)) for index in range(6)]
    for index, request in enumerate(requests):
        request.blocks = tuple(range(index * 4, index * 4 + 4))
    steps = [  # (sequence, first token, tokens)
        [(0, 0, 50), (1, 0, 20)],
        [(0, 50, 1), (2, 0, 5)],
        [(0, 51, 1), (1, 20, 1), (2, 5, 4), (3, 0, 2)],
        [(0, 52, 1), (1, 21, 1), (2, 9, 1), (3, 2, 1), (4, 0, 3)],  # more sequences than 8 tokens are captured with
        [(0, 53, 1), (1, 22, 40)],
        [(0, 54, 1), (4, 3, 30)],
        [(5, 0, 7)],  # of a prompt that goes on: nobody's logits
    ]
    for number, items in enumerate(steps):
        if number == 5:
            monkeypatch.setattr("tradespace.engine.device_runner.MIXED_CONTEXT", 54)
        sequences = tuple(ScheduledSequence(requests[index], start, count) for index, start, count in items)
        for request in requests:
            known = max([start + count for index, start, count in items if index == int(request.id)], default=0)
            request.token_ids = list(ids[int(request.id)][: known + (number == 6)])
        step = Step(sequences, (), SlotUse(0, 0))
        expected, found = plain.execute(step).float(), captured.execute(step).float()
        assert found.shape == expected.shape == (0 if number == 6 else len(items), V)
        assert number == 6 or float((found - expected).abs().max() / expected.abs().max()) < 0.02, number
    assert replayed == [80, 8, 8, 16, 80, 8]
    used = torch.zeros(24 * BLOCK, dtype=torch.bool)
    for request, tokens in zip(requests, (55, 62, 10, 3, 33, 7), strict=True):
        used[request.blocks[0] * BLOCK : request.blocks[0] * BLOCK + tokens] = True
    for one, other in zip(plain.cache.slot_planes(0), captured.cache.slot_planes(0), strict=True):
        if one is not None:
            off = 3.0 if one.dtype == torch.int8 else 0.02  # codes may be rounded the other way
            torch.testing.assert_close(one.float()[used], other.float()[used], atol=off, rtol=0.02)
            assert not other.float()[~used].any()
