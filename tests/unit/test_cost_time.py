"""Traffic by hand, the roofline's terms, and what binds when."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradespace.cost import calibration
from tradespace.cost.summary import cache_token_bytes, summarize, weight_share
from tradespace.cost.time import decode_time, decode_tokens_per_s, prefill_time, rates_for, request_seconds, step_time
from tradespace.cost.traffic import (
    Axes,
    StepWork,
    cache_read_bytes,
    causal_pairs,
    decode_work,
    expected_experts,
    peer_work,
    prefill_work,
    sequences_in_step,
    weight_read_bytes,
)
from tradespace.errors import InputError
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import FORMATS
from tradespace.spec.kv import KVPlan
from tradespace.spec.plan import Placement
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.spec.workload import Workload
from tradespace.spec.zoo import find_model
from unit.cost_examples import cpu, gpu, tiny_model, tiny_plan

WORKLOAD = Workload(context_tokens=64, concurrency=2, prompt_tokens=32, output_tokens=16)
AXES = Axes("sdpa", False, "fp32", 1, 0, "host")


def test_decode_by_hand():
    summary = summarize(tiny_model())
    share, cache = weight_share(summary, WeightPlan(default="fp32")), cache_token_bytes(summary, "fp32")
    work = decode_work(summary, share, cache, AXES, sequences=2, length=40)
    kv = 2 * 2 * 2 * 16 * 4  # a token: layers · k and v · heads · size · fp32
    weights = weight_bytes(tiny_model(), WeightPlan(default="fp32")) + 2 * 64 * 4  # all of them, and two rows of the embedding
    assert work.read_bytes == weights + 2 * (40 * kv + kv + 2 * 128 * 4)
    assert work.flops == 2 * (2 * summary.active_parameters + 2 * 2 * 4 * (16 + 16) * 40)  # tokens · (matrices + layers · 2·N·(H + Hv) · keys)
    assert work.arithmetic_intensity == work.flops / work.read_bytes


def test_windows_bound_what_is_read():
    cache = cache_token_bytes(summarize(tiny_model(window=10)), "fp32")
    assert cache_read_bytes(cache, 8) == 8 * 512
    assert cache_read_bytes(cache, 1000) == 10 * 512


@given(tokens=st.integers(1, 60), window=st.none() | st.integers(1, 80))
def test_causal_pairs_are_counted(tokens, window):
    assert causal_pairs(tokens, window) == sum(min(position + 1, window or tokens) for position in range(tokens))


def test_experts_that_are_read():
    assert expected_experts(8, 2, 1) == pytest.approx(2)
    assert expected_experts(8, 2, 10_000) == pytest.approx(8)
    summary = summarize(find_model("mixtral-8x7b"))
    share = weight_share(summary, WeightPlan(default="bf16"))
    assert weight_read_bytes(summary, share, 1) == pytest.approx(2 * summary.active_parameters, rel=0.01)
    assert weight_read_bytes(summary, share, 10_000) == pytest.approx(share.total_bytes, rel=0.01)


def test_prefill_reads_weights_once_a_chunk():
    summary = summarize(tiny_model())
    share, cache = weight_share(summary, WeightPlan(default="fp32")), cache_token_bytes(summary, "fp32")
    whole, halves = (prefill_work(summary, share, cache, AXES, 32, step) for step in (32, 16))
    assert whole.flops == halves.flops
    # a second reading of the weights, without its chunk's rows of the embedding; keys and values once as far as the first chunk, once to the end
    assert halves.read_bytes - whole.read_bytes == pytest.approx(weight_read_bytes(summary, share, 0) + (16 + 32 - 32) * 512)


def test_all_reduces_by_hand():
    moved, transfers = peer_work(summarize(tiny_model()), tokens=3, e=2, degree=4)
    assert transfers == 4
    assert moved == 4 * 2 * 3 / 4 * (3 * 64 * 2)
    assert peer_work(summarize(tiny_model()), 3, 2, 1) == (0.0, 0)


def test_each_term_can_bind():
    rates = rates_for(gpu(disk_bytes_per_s=Estimate(1e8, "cited: test")), WeightPlan(default="bf16"), "decode")
    assert rates.read_bytes_per_s is not None and rates.flops_per_s is not None
    cases = {
        "bandwidth": StepWork(read_bytes=rates.read_bytes_per_s, flops=1, num_ops=1),
        "compute": StepWork(read_bytes=1, flops=rates.flops_per_s, num_ops=1),
        "overhead": StepWork(read_bytes=1, flops=1, num_ops=1e6),
        "link": StepWork(read_bytes=1, flops=1, num_ops=1, link_bytes=1e9),
        "disk": StepWork(read_bytes=1, flops=1, num_ops=1, link_bytes=1e8, link="disk"),
        "peer": StepWork(read_bytes=1, flops=1, num_ops=1, peer_bytes=50e9),
    }
    for bound, work in cases.items():
        found = step_time(work, rates)
        assert found.bound == bound
        assert found.seconds.require() == pytest.approx(1.0, rel=1e-3)
        assert found.seconds.source.startswith("roofline")


def test_streaming_hides_behind_the_rest_but_overhead_does_not():
    rates = rates_for(gpu(), WeightPlan(default="bf16"), "decode")
    assert rates.read_bytes_per_s is not None
    work = StepWork(read_bytes=rates.read_bytes_per_s, flops=0, num_ops=500_000, link_bytes=0.5e9)
    assert step_time(work, rates).seconds.require() == pytest.approx(1.5)


def test_an_unknown_rate_is_unknown_only_where_it_matters():
    device = gpu(peer_link_bytes_per_s=None)
    assert decode_time(tiny_model(), tiny_plan(), device, WORKLOAD).seconds.known
    found = decode_time(tiny_model(), tiny_plan(tensor_parallel=2), device, WORKLOAD)
    assert not found.seconds.known and "peers" in found.seconds.source
    streamed = tiny_plan(placement=Placement(streamed_layers=1, stream_from="disk"))
    assert not decode_time(tiny_model(), streamed, device, WORKLOAD).seconds.known
    assert decode_tokens_per_s(found, 1, WORKLOAD).value is None


def test_no_bf16_instruction_is_said():
    assert "no bf16 instruction" in rates_for(cpu(), WeightPlan(default="bf16"), "decode").source
    assert "instruction" not in rates_for(cpu(), WeightPlan(default="fp32"), "decode").source


def test_a_library_without_int8_products_does_not_price_our_kernels():
    slow, fast = (cpu(matmul_flops_per_s={"fp32": Estimate(70e9, "cited: test"), "int8": Estimate(rate, "cited: test")}) for rate in (1e9, 400e9))
    weights = WeightPlan(default="q4_0", layout="native")
    at = [rates_for(device, weights, "decode").flops_per_s for device in (slow, fast)]
    share = calibration.NATIVE_OF_MATMUL["int8"].value
    assert at[1] == pytest.approx(at[0] * share * 400 / 70) and "fp32 rate" in rates_for(slow, weights, "decode").source
    assert f"our products at {share:.2f} of the chip's int8 rate" in rates_for(fast, weights, "decode").source


@pytest.mark.parametrize("instruction_sets", [(), ("avx2",), ("avx2", "avx512f", "avx512_vnni")])
def test_our_kernels_are_priced_by_their_own_rates_where_they_were_measured(instruction_sets):
    """Whatever the library's are, and whatever instructions the CPU has; in decode of one sequence the bandwidth is what counts."""
    rates = {form: Estimate(rate, "measured: test") for form, rate in {"int8": 300e9, "bf16": 200e9, "fp32": 100e9}.items()}
    device = cpu(instruction_sets=instruction_sets, matmul_flops_per_s={"fp32": Estimate(1e9, "cited: test")}, native_flops_per_s=rates)
    for name, activations, form in (("q4_0", "auto", "int8"), ("q4_0", "fp32", "fp32"), ("bf16", "auto", "bf16"), ("fp32", "auto", "fp32")):
        for phase, share in (("prefill", "prefill"), ("decode", "few rows")):
            found = rates_for(device, WeightPlan(default=name, layout="native"), phase, activations)
            assert found.flops_per_s == rates[form].value * calibration.find_calibration("native", name, share).efficiency
            assert found.read_bytes_per_s == device.read_bytes_per_s.value * calibration.find_calibration("native", name, "decode").efficiency
            assert "our products" not in found.source
    plain = rates_for(device, WeightPlan(default="bf16"), "prefill")  # torch's kernels have torch's rates
    assert plain.flops_per_s < 1e9


def test_small_working_sets_use_the_curve():
    fast = cpu(bandwidth_curve=((1 << 30, 1e12),))
    assert decode_time(tiny_model(), tiny_plan(), fast, WORKLOAD).seconds.require() < decode_time(tiny_model(), tiny_plan(), cpu(), WORKLOAD).seconds.require()


def test_speed_of_many_and_of_one():
    step = decode_time(tiny_model(), tiny_plan(), cpu(), WORKLOAD)
    seconds = step.seconds.require()
    assert decode_tokens_per_s(step, 2, replace(WORKLOAD, goal="throughput")).value == pytest.approx(2 / seconds)
    assert decode_tokens_per_s(step, 2, WORKLOAD).value == pytest.approx(1 / seconds)
    assert decode_tokens_per_s(step, 1, WORKLOAD).value == pytest.approx(0.5 / seconds)  # half of the time somebody else's turn
    assert request_seconds(0.1, 1.0, 2, WORKLOAD) == pytest.approx(1.0 + 16 * 0.1)
    assert request_seconds(0.1, 1.0, 1, replace(WORKLOAD, goal="throughput")) == pytest.approx(2 * 1.0 + 2 * 16 * 0.1)


def test_sequences_in_a_step():
    paged = tiny_plan(kv=KVPlan(layout="paged", store="fp32"), kv_tokens=96, max_sequences=8)
    assert sequences_in_step(paged, replace(WORKLOAD, concurrency=8)) == 2  # 96 slots, 40 tokens each on average
    assert sequences_in_step(tiny_plan(), WORKLOAD) == 2
    assert sequences_in_step(tiny_plan(max_sequences=1), WORKLOAD) == 1


def test_a_roofline_of_a_real_model():
    device = gpu(read_bytes_per_s=Estimate(1555e9, "cited"), op_overhead_s=Estimate(0.0, "cited"))
    plan = tiny_plan(weights=WeightPlan(default="bf16"), kv=KVPlan(layout="contiguous"), attention="flash", max_context=1024, kv_tokens=2048, step_tokens=512)
    step = decode_time(find_model("llama-2-7b"), plan, device, Workload(context_tokens=1024))
    assert step.bound == "bandwidth"
    assert step.seconds.require() == pytest.approx(13.5e9 / (1555e9 * 0.7), rel=0.03)
    assert prefill_time(find_model("llama-2-7b"), plan, device, Workload(context_tokens=1024)).bound == "compute"


def test_calibration_covers_every_format():
    for kind in ("cpu", "cuda", "mps"):
        for phase in ("decode", "prefill"):
            assert all(0 < calibration.find_calibration(kind, name, phase).efficiency <= 1 for name in FORMATS)
    assert "assumed" in calibration.find_calibration("cuda", "bf16", "decode").label
    with pytest.raises(InputError, match="cpu, cuda, cuda step, mps"):
        calibration.find_calibration("abacus", "bf16", "decode")
