"""The sampler against transformers' processors, against arithmetic in plain Python, and against the distribution that it must draw from."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.sampler import Sampler, SampleRow, adjust_
from tradespace.kernels.sample import noise
from tradespace.kernels.sample.reference import PROBE, temper_, truncate_

torch.set_num_threads(1)


def row(drafts=(), prompt=(1, 2, 3), outputs=(), eos=(), **params) -> SampleRow:
    request = Request(id="a", prompt_ids=prompt, params=SamplingParams(**{"seed": 0, **params}), eos_ids=frozenset(eos))
    request.token_ids += outputs
    return SampleRow(request, tuple(drafts))


def logits_of(rows: int, V: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * spread


WARPED = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.001},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 200, "top_p": 0.5, "min_p": 0.01},
    {"temperature": 0.6, "top_k": 1500, "top_p": 0.95},
    {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 1.0},
]


@pytest.mark.parametrize("V", [50, 6000])
def test_what_is_kept_and_how_likely_it_is_as_in_transformers(V):
    """All settings in one batch: each row must come out as transformers has it alone."""
    params = [SamplingParams(**settings) for settings in WARPED]
    logits_RV = logits_of(len(params), V)
    ours_RV = logits_RV.clone()
    temper_(ours_RV, [p.temperature for p in params])
    truncate_(ours_RV, params)
    for p, logits_V, ours_V in zip(params, logits_RV, ours_RV, strict=True):
        theirs = logits_V[None].clone()
        ids = torch.zeros(1, 1, dtype=torch.long)
        theirs = TemperatureLogitsWarper(float(p.temperature))(ids, theirs)
        if p.top_k > 0:
            theirs = TopKLogitsWarper(top_k=p.top_k)(ids, theirs)
        if p.top_p < 1:
            theirs = TopPLogitsWarper(top_p=p.top_p)(ids, theirs)
        if p.min_p > 0:
            theirs = MinPLogitsWarper(min_p=p.min_p)(ids, theirs)
        assert torch.equal(ours_V > -math.inf, theirs[0] > -math.inf), p
        assert torch.allclose(ours_V.softmax(-1), theirs[0].softmax(-1), atol=1e-6, rtol=1e-4), p


def test_a_nucleus_wider_than_the_probe_is_still_exact():
    V = 4 * PROBE
    logits_RV = torch.stack([logits_of(1, V, spread=0.1)[0], logits_of(1, V, spread=9.0)[0]])
    ours_RV = logits_RV.clone()
    truncate_(ours_RV, [SamplingParams(top_p=0.8)] * 2)
    theirs_RV = TopPLogitsWarper(top_p=0.8)(torch.zeros(2, 1), logits_RV.clone())
    kept = (ours_RV > -math.inf).sum(-1)
    assert kept[0] > PROBE > kept[1]
    assert torch.equal(ours_RV > -math.inf, theirs_RV > -math.inf)


def test_ties_with_the_last_kept_token_are_kept():
    logits_RV = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]] * 2)
    truncate_(logits_RV, [SamplingParams(top_k=2), SamplingParams(top_p=0.6)])
    assert (logits_RV > -math.inf).tolist() == [[False, True, True, True, True, False]] * 2


def test_penalties_bias_and_min_tokens():
    logits_RV = logits_of(3, 40)
    rows = [
        row(prompt=(1, 2, 3), outputs=(5, 5), drafts=(6,), repetition_penalty=1.7),
        row(prompt=(1, 2, 3), outputs=(5, 5, 7), drafts=(5,), presence_penalty=0.4, frequency_penalty=0.3),
        row(prompt=(1,), outputs=(4,), eos=(9,), logit_bias={3: 2.5, 8: -100.0}, min_tokens=3, stop_token_ids=(11,)),
    ]
    ours_RV = logits_RV.clone()
    adjust_(ours_RV, rows)
    ids = torch.tensor([[1, 2, 3, 5, 5, 6]])
    assert torch.equal(ours_RV[:1], RepetitionPenaltyLogitsProcessor(1.7)(ids, logits_RV[:1].clone()))
    want = logits_RV[1].clone()
    want[5] -= 0.4 + 3 * 0.3
    want[7] -= 0.4 + 0.3
    assert torch.allclose(ours_RV[1], want, atol=1e-6)
    want = logits_RV[2].clone()
    want[3] += 2.5
    want[8] -= 100
    want[[9, 11]] = -math.inf
    assert torch.equal(ours_RV[2], want)


def test_stop_tokens_return_once_there_are_min_tokens():
    logits_RV = torch.zeros(2, 6)
    logits_RV[:, 4] = 5.0
    rows = [row(outputs=(1,) * count, eos=(4,), temperature=0, min_tokens=3) for count in (2, 3)]
    assert [choice.token_id for choice in Sampler().sample(logits_RV, rows)] == [0, 4]


def test_the_noise_is_splitmix64():
    key, tokens = noise.noise_key(seed=2**63 + 5, sample=0, position=17), [0, 1, 77, 262143]
    got = noise.gumbel(torch.tensor(key), torch.tensor(tokens))
    for token, value in zip(tokens, got.tolist(), strict=True):
        state = noise.mix64((key + (token + 1) * noise.GOLDEN) % 2**64)
        assert value == pytest.approx(-math.log(-math.log(((state >> 12) + 0.5) / 2**52)), rel=1e-12)
    # the generator's published first outputs for seed 1234567
    assert [noise.mix64((1234567 + i * noise.GOLDEN) % 2**64) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]


def test_every_part_of_the_counter_matters():
    keys = {noise.noise_key(seed, sample, position) for seed in range(-20, 20) for sample in range(5) for position in range(50)}
    assert len(keys) == 40 * 5 * 50


def test_the_noise_is_gumbel_and_uncorrelated():
    keys = torch.tensor([noise.noise_key(1, 0, position) for position in range(200)])
    drawn = noise.gumbel(keys[:, None], torch.arange(1000)[None, :])
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for other in (drawn.roll(1, 0), drawn.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1].item()) < 0.01


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.4}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(settings):
    """Chi-square over 20,000 positions of one request, seeds fixed: the statistic must lie within five standard deviations of its mean."""
    count, V = 20_000, 24
    logits_V = logits_of(1, V, spread=1.5)[0]
    params = SamplingParams(seed=11, **settings)
    want_1V = logits_V[None].clone()
    temper_(want_1V, [params.temperature])
    truncate_(want_1V, [params])
    want = want_1V[0].double().softmax(-1) * count
    rows = [row(drafts=(0,) * position, prompt=(1,), seed=11, **settings) for position in range(200)]
    rows = [SampleRow(Request(id="a", prompt_ids=(1,), params=SamplingParams(seed=seed, **settings)), r.drafts) for seed in range(100) for r in rows]
    drawn = torch.tensor([choice.token_id for choice in Sampler().sample(logits_V.expand(count, V), rows)])
    seen = torch.bincount(drawn, minlength=V).double()
    assert (seen[want == 0] == 0).all()
    kept = want > 0
    statistic = ((seen - want)[kept] ** 2 / want[kept]).sum().item()
    df = int(kept.sum()) - 1
    assert abs(statistic - df) < 5 * math.sqrt(2 * df)


def test_each_row_is_computed_from_itself_alone():
    """Neighbours, order and the size of the groups change no token and no log-probability."""
    settings = [*WARPED, {"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.5, "logprobs": 3}, {"logit_bias": {5: 3.0}, "logprobs": 0}]
    rows = [row(outputs=(7,) * index, **{**each, "seed": index}) for index, each in enumerate(settings * 3)]
    logits_RV = logits_of(len(rows), 3000)
    alone = [Sampler().sample(logits_RV[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    for chunk_elements in (1, 7000, 10**9):
        assert Sampler(chunk_elements=chunk_elements).sample(logits_RV, rows) == alone
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    assert Sampler().sample(logits_RV[order], [rows[i] for i in order]) == [alone[i] for i in order]


def test_logits_are_left_as_they_were():
    logits_RV = logits_of(3, 100)
    before = logits_RV.clone()
    Sampler().sample(logits_RV, [row(temperature=0), row(top_k=3), row(repetition_penalty=2.0, logit_bias={1: 1.0})])
    assert torch.equal(before, logits_RV)


def test_logprobs_are_of_the_unmodified_logits():
    logits_RV = logits_of(1, 100)
    (choice,) = Sampler().sample(logits_RV, [row(temperature=0.3, top_k=2, logit_bias={50: 100.0}, logprobs=4)])
    want_V = torch.log_softmax(logits_RV[0], -1)
    assert choice.token_id == 50 and choice.logprobs is not None
    assert choice.logprobs.logprob == want_V[50].item()
    best = want_V.topk(4)
    assert choice.logprobs.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def test_greedy_takes_the_first_of_equals():
    logits_RV = torch.zeros(2, 1000)
    logits_RV[:, [300, 700]] = 1.0
    assert [choice.token_id for choice in Sampler().sample(logits_RV, [row(temperature=0), row(temperature=0, logit_bias={1: 0.5})])] == [300, 300]


def test_rows_that_are_not_numbers_choose_nothing_and_hurt_no_other():
    logits_RV = logits_of(5, 50)
    logits_RV[0, 7] = math.nan
    logits_RV[1] = -math.inf
    logits_RV[2, 3] = math.nan
    rows = [row(temperature=0), row(), row(top_k=4), row(temperature=0), row(top_p=0.5)]
    chosen = [choice.token_id for choice in Sampler().sample(logits_RV, rows)]
    assert chosen[:3] == [None] * 3 and None not in chosen[3:]


def test_padding_of_the_vocabulary_is_never_chosen():
    logits_RV = torch.zeros(2, 64)
    logits_RV[:, 60] = 50.0
    for choice in Sampler(num_tokens=60).sample(logits_RV, [row(temperature=0), row()]):
        assert choice.token_id is not None and choice.token_id < 60


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside of it hold at once; a storage lives as long as one tensor object over it."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.now = self.peak = 0
        self.owners = {tensor.untyped_storage().data_ptr(): 1 for tensor in known}  # not ours to count: never goes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                key, nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                if key not in self.owners:
                    self.owners[key] = 0
                    self.now += nbytes
                    self.peak = max(self.peak, self.now)
                self.owners[key] += 1
                weakref.finalize(tensor, self._gone, key, nbytes)
        return result

    def _gone(self, key, nbytes):
        self.owners[key] -= 1
        if self.owners[key] == 0:
            del self.owners[key]
            self.now -= nbytes


def test_the_measure_of_peaks_can_fail():
    with PeakBytes() as peak:
        first = torch.zeros(1000)
        second = first + 1
        del first
        second = second.view(10, 100) * 2
    assert peak.peak == 8000 and peak.now == 4000


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"logprobs": 5},
        {"repetition_penalty": 1.1},
        {"top_p": 0.999999, "temperature": 50.0},
    ],
)
def test_the_workspace_is_what_it_says_whatever_the_batch(settings):
    V, sampler = 50_000, Sampler(chunk_elements=50_000)
    for count in (2, 16):
        rows = [row(**settings) for _ in range(count)]
        logits_RV = logits_of(count, V)
        with PeakBytes(logits_RV) as peak:
            sampler.sample(logits_RV, rows)
        assert peak.peak <= sampler.workspace_bytes(V), (peak.peak, sampler.workspace_bytes(V))
