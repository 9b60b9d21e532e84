"""The engine on a real (small, random) Transformer: with the reference kernels a request's logits are the same bits whatever else is in the batch."""

import random

import pytest
import torch

from tradespace.engine.engine import Engine
from tradespace.engine.request import SamplingParams
from tradespace.engine.runner import Runner
from tradespace.engine.sampler import Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.speculative import NgramDrafter
from tradespace.kernels.view import StepBatch
from tradespace.kv.cache import KVCache
from tradespace.model.transformer import Transformer
from tradespace.spec.kv import KVPlan
from tradespace.spec.model import Attention, DenseFFN, LayerSpec, ModelSpec, Rope
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan

torch.set_num_threads(1)
V, CONTEXT = 97, 96


def layer(window: int | None) -> LayerSpec:
    return LayerSpec(mixer=Attention(N=4, K=2, H=8, rope=Rope(dims=8), window=window), ffn=DenseFFN(F=40))


SPEC = ModelSpec(name="tiny", family="llama", D=32, V=V, layers=(layer(None), layer(7), layer(None)), max_context=CONTEXT)


@pytest.fixture(scope="module", params=["reference", "sdpa", "chunked"])
def kernel(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kernel) -> Transformer:
    linear = "reference" if kernel == "reference" else "torch"
    found = Transformer(SPEC, WeightPlan(default="fp32"), attention=kernel, linear=linear, max_context=CONTEXT)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.3)
    return found


class Recorder(Sampler):
    """Keeps every row of logits, by request and position."""

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}

    def sample(self, logits_RV, rows):
        for row, logits_V in zip(rows, logits_RV, strict=True):
            if not row.drafts:
                self.seen[row.request.prompt_ids, row.position] = logits_V.clone()
        return super().sample(logits_RV, rows)


def engine_of(model: Transformer, *, layout: str = "paged", block_size: int = 8, prefix_sharing: bool = False, drafter=None, **changes) -> Engine:
    kv = KVPlan(layout=layout, block_size=block_size, store="fp32", prefix_sharing=prefix_sharing)
    settings = {"max_sequences": 6, "max_context": CONTEXT, "step_tokens": 40, "kv_tokens": 6 * CONTEXT, "speculation": 3 if drafter else 0, **changes}
    plan = Plan(model="tiny", kv=kv, **settings)
    scheduler = Scheduler.from_plan(plan)
    cache = KVCache(SPEC, kv, num_blocks=plan.num_blocks, block_size=scheduler.block_size, dtype=torch.float32)
    return Engine(Runner(model, cache, plan), scheduler, Recorder(), drafter=drafter)


PICK = random.Random(4)
PROMPTS = [tuple(PICK.randrange(V) for _ in range(PICK.choice([1, 3, 17, 40, 60]))) for _ in range(9)]
PARAMS = [SamplingParams(temperature=0, max_tokens=20) if i % 2 else SamplingParams(seed=i, max_tokens=24, top_p=0.9) for i in range(9)]

SETTINGS = [
    {},
    {"step_tokens": 3},
    {"kv_tokens": 96},
    {"layout": "contiguous", "max_sequences": 3},
    {"block_size": 1, "kv_tokens": 130, "step_tokens": 17},
    {"drafter": NgramDrafter()},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: ",".join(map(str, changes)) or "all at once")
def test_same_request_same_tokens(model, kernel, changes):
    """Alone, together, chunked, preempted, in either layout, with drafts: the reference's logits are equal bit for bit, others' within 1e-4."""
    together = engine_of(model, **changes)
    completions = together.generate(PROMPTS, PARAMS)
    assert together.scheduler.allocator.num_used == 0
    if changes.get("kv_tokens"):
        assert together.counters.preemptions > 0
    for prompt, params, completion in zip(PROMPTS, PARAMS, completions, strict=True):
        alone = engine_of(model, step_tokens=CONTEXT)
        assert alone.generate([prompt], params)[0].output_ids == completion.output_ids
        for key, logits_V in alone.sampler.seen.items():  # pyright: ignore[reportAttributeAccessIssue]
            other_V = together.sampler.seen.get(key)  # pyright: ignore[reportAttributeAccessIssue]
            if other_V is None:
                assert "drafter" in changes  # that row was verified as a draft
            elif kernel == "reference":
                assert torch.equal(logits_V, other_V)
            else:
                assert (logits_V - other_V).abs().max() < 1e-4


def test_the_engine_computes_what_the_model_computes_without_a_cache(model):
    engine = engine_of(model, step_tokens=11)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=10)), strict=True):
        tokens = torch.tensor([*prompt, *completion.output_ids])
        with torch.no_grad():
            logits_TV = model.logits(model(tokens, torch.arange(len(tokens)), StepBatch.packed([len(tokens)])))
        assert logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == list(completion.output_ids)


def test_a_lone_sequence_is_read_without_a_copy(model):
    engine = engine_of(model)
    request = engine.add(PROMPTS[3], SamplingParams(temperature=0, max_tokens=30))
    while not request.finished:
        blocks = request.blocks
        engine.step()
        assert blocks == tuple(range(len(blocks)))
