"""The native sampler against the torch one: the same token from the same logits and key, for any shape, any neighbours, any threads, every instruction set."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from native.sanitized import examples
from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.sampler import Sampler, SampleRow
from tradespace.kernels.native import load, unavailable
from tradespace.kernels.native.compiler import ISAS, cpu_flags
from tradespace.kernels.sample.native import NativeSampling
from tradespace.kernels.sample.noise import noise_key
from tradespace.kernels.sample.reference import TorchSampling
from tradespace.spec.native import sample_bytes

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"native kernels: {unavailable()}")
HERE = [isa for isa, (need, _) in ISAS.items() if need <= cpu_flags()]


def make_row(kind: str, V: int, seed: int) -> torch.Tensor:
    """Logits of one of the kinds that go wrong in their own ways."""
    g = torch.Generator().manual_seed(seed)
    x_V = torch.randn(V, generator=g) * 3
    some_V = torch.rand(V, generator=g)
    if kind == "peaked":
        x_V[some_V < 20 / V] += 15
    elif kind == "flat":
        x_V *= 1e-3
    elif kind == "equal":
        x_V[:] = -2.5
    elif kind == "ties":
        x_V = x_V.round()
    elif kind == "masked":
        x_V[some_V < 0.9] = -math.inf
    elif kind == "huge":
        x_V *= 1e37
    elif kind == "tiny":
        x_V *= 1e-40
    elif kind == "nan":
        x_V[seed % V] = math.nan
    elif kind == "infinite":
        x_V[seed % V] = math.inf
    elif kind == "nothing":
        x_V[:] = -math.inf
    return x_V


KINDS = ["normal", "peaked", "flat", "equal", "ties", "masked", "huge", "tiny", "nan", "infinite", "nothing"]
SHAPES = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 1e-4, 0.3, 0.8, 1, 1.7, 50]),
    top_k=st.sampled_from([0, -1, 1, 2, 5, 40, 300, 5000, 60000]),
    top_p=st.sampled_from([1, 0.999999, 0.95, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0, 0.001, 0.05, 0.5, 1]),
)
WIDTHS = st.one_of(st.integers(1, 200), st.sampled_from([1023, 1024, 1025, 5000, 16_384, 32_000, 49_152, 50_257]))
ROWS = st.lists(st.tuples(st.sampled_from(KINDS), SHAPES), min_size=1, max_size=6)


def matrix_of(rows: list[tuple[str, SamplingParams]], V: int, seed: int, gap: int) -> torch.Tensor:
    """The rows, `gap` floats apart; what lies between them would win if it were read."""
    whole = torch.full((len(rows), V + gap), 1e30)
    for index, (kind, _) in enumerate(rows):
        whole[index, :V] = make_row(kind, V, seed + index)
    return whole[:, :V]


@settings(max_examples=examples(150), deadline=None)
@given(rows=ROWS, V=WIDTHS, seed=st.integers(0, 2**20), gap=st.sampled_from([0, 1, 7, 16]), threads=st.sampled_from([1, 2, 7]))
@example(rows=[("normal", SamplingParams(temperature=t, top_p=p)) for t in (0, 1) for p in (1, 0.95)], V=262_144, seed=5, gap=3, threads=2)
@example(rows=[("flat", SamplingParams(top_p=0.9))], V=262_144, seed=6, gap=0, threads=7)
@example(rows=[("normal", SamplingParams())], V=262_144, seed=7, gap=1, threads=7)
def test_tokens_are_those_of_torch(rows, V, seed, gap, threads):
    logits_RV = matrix_of(rows, V, seed, gap)
    before_RV = logits_RV.clone()
    shapes, keys = [shape for _, shape in rows], [noise_key(seed, 0, index) for index in range(len(rows))]
    native = NativeSampling(vocab_size=V, max_rows=4, threads=threads)  # six rows come in two calls
    assert native.best(logits_RV) == TorchSampling().best(logits_RV)
    together = native.draw(logits_RV, range(len(rows)), shapes, keys)
    assert together == TorchSampling().draw(logits_RV, range(len(rows)), shapes, keys)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    part = order[: len(order) // 2 + 1]
    assert native.draw(logits_RV, part, [shapes[i] for i in part], [keys[i] for i in part]) == [together[i] for i in part], "a row depends on its neighbours"
    assert torch.equal(logits_RV.nan_to_num(), before_RV.nan_to_num())


@pytest.mark.parametrize("isa", HERE)
def test_instruction_sets_agree(isa):
    shapes = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t in (0, 0.8) for k, p, m in [(0, 1, 0), (40, 1, 0), (0, 0.95, 0), (300, 0.9, 0.01)]]
    for V in (1, 15, 1000, 33_333):
        for kind in KINDS:
            logits_RV = matrix_of([(kind, shape) for shape in shapes], V, 3, 5)
            keys = [noise_key(V, 0, index) for index in range(len(shapes))]
            forced = NativeSampling(vocab_size=V, max_rows=8, threads=2, library=load(isa))
            assert forced.best(logits_RV) == TorchSampling().best(logits_RV), (kind, V)
            assert forced.draw(logits_RV, range(8), shapes, keys) == TorchSampling().draw(logits_RV, range(8), shapes, keys), (kind, V)


@pytest.mark.parametrize("shape", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.4}, {"min_p": 0.1}])
def test_draws_follow_the_reference_for_thousands_of_keys(shape):
    """Every one of 4,000 draws from one distribution: the tokens that win rarely are the ones that a wrong bound would lose."""
    count, V = 4_000, 300
    logits_RV = make_row("normal", V, 1).expand(count, V)
    shapes, keys = [SamplingParams(**shape)] * count, [noise_key(1, 0, index) for index in range(count)]
    native = NativeSampling(vocab_size=V, max_rows=512, threads=2)
    assert native.draw(logits_RV, range(count), shapes, keys) == TorchSampling().draw(logits_RV, range(count), shapes, keys)


def test_the_sampler_gives_the_same_with_either_kernel():
    """Bias, penalties, min_tokens and log-probabilities stay in torch, whatever draws."""
    V = 5000
    each = [
        {"temperature": 0},
        {"top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 0, "logit_bias": {7: 40.0}, "logprobs": 2},
        {"min_tokens": 5, "stop_token_ids": (3,)},
        {"top_k": 20, "presence_penalty": 0.5, "logprobs": 0},
        {},
    ]
    rows = [SampleRow(Request(id="a", prompt_ids=(1, 2, 3), params=SamplingParams(**{"seed": i, **settings}))) for i, settings in enumerate(each * 2)]
    logits_RV = matrix_of([("normal", row.params) for row in rows], V, 1, 3)
    native = NativeSampling(vocab_size=V - 8, max_rows=12, threads=2)
    want = Sampler(num_tokens=V - 8).sample(logits_RV, rows)
    assert Sampler(num_tokens=V - 8, kernel=native).sample(logits_RV, rows) == want
    assert Sampler(num_tokens=V - 8, kernel=native, chunk_elements=1).sample(logits_RV, rows) == want
    assert Sampler(kernel=native).sample(logits_RV[:0], []) == []


def test_its_bytes_are_those_of_the_ledger():
    for V, rows, threads in [(1, 1, 1), (49_152, 16, 2), (1000, 1, 7)]:
        native = NativeSampling(vocab_size=V, max_rows=rows, threads=threads)
        assert native.nbytes == native.workspace_bytes(V) == sample_bytes(V, rows, threads) == min(rows, threads) * 8 * (-(-V // 16) * 16)
