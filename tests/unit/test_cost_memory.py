"""The ledger against values computed by hand, its rule for peaks, tensor parallelism, and what must grow when something grows."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.cost import calibration, workspace
from tradespace.cost.memory import Ledger, LedgerLine, ledger, peak_bytes
from tradespace.cost.summary import heads_per_device, shard_shape, summarize, weight_share
from tradespace.spec.attention import KERNELS
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import FORMATS
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec, RoutedFFN
from tradespace.spec.plan import Placement
from tradespace.spec.tensors import TensorSpec, model_tensors
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.spec.zoo import find_model
from unit.cost_examples import cpu, gpu, tiny_model, tiny_plan


def test_lines_by_hand():
    # D 64, V 128, N 4, K 2, H 16, F 128, L 2, tied, all fp32
    found = ledger(tiny_model(), tiny_plan(), cpu(), staging_bytes=5000, tokenizer_bytes=700)
    expected = {
        "runtime": 1_000_000,
        "weights: embed": 128 * 64 * 4,
        "weights: norm": (2 * 2 + 1) * 64 * 4,  # two a layer, and the last
        "weights: qkv": 2 * (4 + 2 * 2) * 16 * 64 * 4,
        "weights: attn_out": 2 * 64 * 64 * 4,
        "weights: gate_up": 2 * 2 * 128 * 64 * 4,
        "weights: down": 2 * 64 * 128 * 4,
        "kv cache": 2 * 64 * (2 * 2 * 2 * 16 * 4),  # sequences · context · (layers · k and v · heads · size · fp32)
        "engine tensors": 64 * 16 * 4 + 2 * 4 + 2 * 4 * 3 + 3 * 8 * 32,
        "heap": calibration.HEAP_BYTES.value,
        "tokenizer": 700,
        "staging": 5000,
    }
    for name, size in expected.items():
        assert found.line(name).bytes.value == size, name
    assert {line.name for line in found.lines} == {*expected, "product kernels", "workspace", "logits"}
    with pytest.raises(KeyError, match="kv cache"):
        found.line("nothing")


def test_workspace_by_hand():
    # T 32, D 64, e 4: old stream, new stream and norm 3·T·D; products T·2F, act and product 2·T·F; cosines and sines of 16 dims
    rope = 32 * 2 * 16 * 4
    found = ledger(tiny_model(F=512), tiny_plan(attention="flash"), cpu())
    assert found.line("workspace").bytes.value == 3 * 32 * 64 * 4 + 32 * 2 * 512 * 4 + 2 * 32 * 512 * 4 + rope
    # before flash the stream and its norm, q, k, v, and the rotated q and k; flash holds for one sequence its output and a sum per row; then the projection out
    before = 2 * 32 * 64 * 4 + 32 * 8 * 16 * 4 + 32 * 6 * 16 * 4 + rope
    found = ledger(tiny_model(F=16), tiny_plan(attention="flash", max_sequences=1), cpu())
    assert found.line("workspace").bytes.value == before + max(32 * 64 * 4 + 32 * 4 * 4, 2 * 32 * 64 * 4)
    # for two also the keys and values of both side by side and of one that is copied there, their outputs twice, eight numbers each
    found = ledger(tiny_model(F=16), tiny_plan(attention="flash"), cpu())
    assert found.line("workspace").bytes.value == before + 2 * 32 * 64 * 4 + 32 * 4 * 4 + 2 * 128 * (2 * 2 * 16 * 4) + 2 * 8 * 4
    assert found.line("logits").bytes.value == max(32 * 64 * 4 + 2 * 128 * 4, 2 * 128 * (4 + 9))
    narrow = ledger(tiny_model(V=4096), tiny_plan(weights=WeightPlan(default="bf16")), cpu()).line("logits").bytes.value
    assert narrow == max(32 * 64 * 2 + 2 * 4096 * (2 + 4), 2 * 4096 * (4 + 9))


def test_a_scale_per_row_is_applied_in_fp32():
    shape = workspace.step_shape(tiny_plan(weights=WeightPlan(default="int8"), step_tokens=64))
    assert workspace.product_bytes([FORMATS["int8"]], 512, 64, 64, shape) == 8 * 64 * 512  # one tile: both sides of the product in fp32
    assert workspace.product_bytes([FORMATS["int4"]], 512, 64, 64, shape) == 0  # scaled in the tile
    assert workspace.product_bytes([FORMATS["bf16"]], 512, 64, 64, shape) == 0
    wide = workspace.product_bytes([FORMATS["int4"]], 2**16, 64, 64, shape)  # two tiles of 2^15 rows, put together
    assert wide == 64 * 2**16 * 2


def test_kept_products():
    def kept(**changes):
        lines = {line.name: line for line in ledger(tiny_model(), tiny_plan(**changes), cpu()).lines}
        return lines["product kernels"].bytes.value if "product kernels" in lines else 0

    each = calibration.PRODUCT_KERNEL_BYTES.value
    # qkv (128, 64), out (64, 64), gate_up (256, 64), down (64, 128) at 1, 2, 4, 8, 16, 32 rows; the head (128, 64) at 1 and 2 is qkv's shape
    assert kept(weights=WeightPlan(default="bf16")) == 4 * 6 * each
    assert kept(weights=WeightPlan(default="int8")) == 4 * 2 * each  # up to 12 rows go through the fused kernel, the head's two with them
    assert kept(weights=WeightPlan(default="fp16")) == kept(weights=WeightPlan(default="bf16"), linear="reference") == 0
    assert kept() == calibration.FP32_PRODUCT_BYTES.value


def test_peak_is_a_maximum_over_moments():
    def line(name, size, phase):
        return LedgerLine(name, "host", Estimate(size, "exact"), "", phase)

    lines = (line("a", 10, "always"), line("b", 7, "loading"), line("c", 3, "running"), line("d", 2, "layers"), line("e", 5, "head"))
    assert Ledger(lines, "host").total_bytes().value == 10 + max(7, 3 + 5) == peak_bytes(10, 7, 3, 2, 5)
    assert Ledger((*lines, line("f", 9, "loading")), "host").total_bytes().value == 10 + 16


def test_an_unknown_line_makes_the_total_unknown():
    lines = (LedgerLine("a", "host", Estimate(1, "exact"), ""), LedgerLine("b", "host", Estimate.unknown("nobody looked"), ""))
    total = Ledger(lines, "host").total_bytes()
    assert not total.known and "b: unknown: nobody looked" in total.source


def test_runtime_that_no_device_states_is_assumed_and_says_so():
    found = ledger(tiny_model(), tiny_plan(), cpu(runtime_bytes=Estimate.unknown("not measured")))
    assert found.line("runtime").bytes.value == calibration.RUNTIME_BYTES["cpu"].value
    assert found.line("runtime").bytes.source.startswith("assumed")


def test_paged_cache_holds_its_slots():
    plan = tiny_plan(kv=KVPlan(layout="paged", block_size=16, store="fp32"), kv_tokens=80)
    found = ledger(tiny_model(), plan, cpu()).line("kv cache")
    assert found.bytes.value == 80 * 2 * 2 * 2 * 16 * 4
    assert found.formula == "5 blocks × 16 tokens × 512 B"


def test_pools_of_a_device():
    found = ledger(tiny_model(), tiny_plan(placement=Placement(streamed_layers=1)), gpu())
    share = weight_share(summarize(tiny_model()), WeightPlan(default="fp32"))
    assert found.compute_pool == "device" and set(found.pools) == {"device", "host"}
    assert found.line("streamed weights").pool == "host"
    assert found.line("streamed weights").bytes.value == share.layer_bytes[1]
    assert found.line("stream buffer").bytes.value == share.layer_bytes[1]  # one layer is in flight, not two
    assert found.line("tokenizer").pool == "host"


def test_quantized_plans_dequantize_into_a_tile():
    found = ledger(tiny_model(F=256), tiny_plan(weights=WeightPlan(default="int8")), cpu())
    assert found.line("dequantized matrix").bytes.value == (2 * 256 * 64 + 2 * 256) * 2  # gate_up and a row of ones, in bf16
    assert found.line("weights: down").bytes.value == 2 * FORMATS["int8"].nbytes((64, 256))
    mixed = ledger(tiny_model(), tiny_plan(weights=WeightPlan(default="int8", exceptions={"0:down": "bf16"})), cpu())
    assert mixed.line("weights: down (bf16)").bytes.value == 64 * 128 * 2
    assert mixed.line("weights: down (int8)").bytes.value == FORMATS["int8"].nbytes((64, 128))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("model", ["smollm2-135m", "mixtral-8x7b", "deepseek-v3"])
def test_one_device_holds_what_the_weights_take(model, name):
    spec, weights = find_model(model), WeightPlan(default=name)
    assert weight_share(summarize(spec), weights).total_bytes == weight_bytes(spec, weights)


def test_shares_of_a_parallel_model_by_hand():
    model = tiny_model()
    shapes = {tensor.name: shard_shape(model, tensor, 4) for tensor in model_tensors(model)}
    assert shapes["layers.0.attn.qkv.weight"] == ((1 + 1 + 1) * 16, 64)  # one query head of four; two kv heads on four devices: one on each
    assert shapes["layers.0.attn.out.weight"] == (64, 16)
    assert shapes["layers.0.ffn.gate_up.weight"] == (64, 64)
    assert shapes["layers.0.ffn.down.weight"] == (64, 32)
    assert shapes["embed.weight"] == (32, 64)
    assert shapes["layers.0.attn_norm.weight"] == (64,)
    assert [heads_per_device(8, degree) for degree in (1, 2, 8, 16)] == [8, 4, 1, 1]
    experts = TensorSpec("layers.0.ffn.experts.down.weight", "experts", (8, 64, 128), 0)
    assert shard_shape(model, experts, 4) == (8, 64, 32)


def test_parallel_cache_divides_until_heads_run_out():
    sizes = [ledger(tiny_model(N=8, K=2), tiny_plan(tensor_parallel=degree), gpu()).line("kv cache").bytes.require() for degree in (1, 2, 4)]
    assert sizes[1] == sizes[2] == sizes[0] / 2


def test_mixed_layers_take_the_worst():
    wide = LayerSpec(mixer=Attention(N=4, K=4, H=16), ffn=RoutedFFN(E=4, top_k=2, F=512))
    narrow = LayerSpec(mixer=Attention(N=4, K=4, H=16), ffn=DenseFFN(F=16))
    model = ModelSpec(name="mixed", family="test", D=64, V=32, layers=(narrow, wide, narrow), max_context=128)
    shape = workspace.step_shape(tiny_plan())
    alone = ModelSpec(name="wide", family="test", D=64, V=32, layers=(wide,), max_context=128)
    weights = WeightPlan(default="fp32")
    assert workspace.activation_bytes(summarize(model), weights, shape) == workspace.activation_bytes(summarize(alone), weights, shape)


def test_kernels_grow_as_they_say():
    mixer = Attention(N=4, K=4, H=16)

    def size(kernel, S):
        return workspace.kernel_bytes(mixer, workspace.StepShape(T=64, S=S, e=4, kernel=kernel, gathered=False))

    output = 64 * 4 * 16 * 4
    assert size("flash", 4096) == size("flash", 16384) == output + 4 * 64 * 4 + 32  # log-sums, and what it is told of a sequence
    assert 3.9 < (size("reference", 65536) - 2 * output) / (size("reference", 16384) - 2 * output) <= 4
    assert 1.5 < (size("chunked", 65536) - output) / (size("chunked", 16384) - output) < 2.2  # √n
    assert size("sdpa", 16384) < size("reference", 16384) / 4
    assert set(KERNELS) == set(calibration.KERNEL_OPS)


def test_the_reference_widens_rows():
    found = ledger(tiny_model(F=256), tiny_plan(weights=WeightPlan(default="bf16"), linear="reference"), cpu())
    assert found.line("reference tile").bytes.value == 1024 * 256 * 4  # rows · columns of down · fp32
    assert ledger(tiny_model(), tiny_plan(linear="reference"), cpu()).line("reference tile").bytes.value == 0  # fp32 is as wide already


def test_only_scattered_keys_are_gathered():
    mixer = Attention(N=4, K=2, H=16, value_H=8)
    shape = workspace.StepShape(T=8, S=100, e=2, kernel="chunked", gathered=True)
    assert workspace.kernel_bytes(mixer, shape) - workspace.kernel_bytes(mixer, replace(shape, gathered=False)) == 100 * 2 * (16 + 8) * 2


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(FORMATS)),
    kernel=st.sampled_from([name for name in KERNELS if name not in ("native", "paged")]),
    layout=st.sampled_from(["paged", "contiguous"]),
    context=st.integers(1, 20),
    sequences=st.integers(1, 8),
    step=st.integers(1, 64),
    grow=st.sampled_from(["context", "sequences", "step"]),
)
def test_more_of_anything_never_takes_less(name, kernel, layout, context, sequences, step, grow):
    def total(context, sequences, step):
        plan = tiny_plan(
            weights=WeightPlan(default=name),
            kv=KVPlan(layout=layout, block_size=16, store="bf16"),
            attention=kernel,
            max_context=16 * context,
            max_sequences=sequences,
            step_tokens=step,
            kv_tokens=16 * context * sequences,
        )
        return ledger(tiny_model(), plan, cpu()).total_bytes().require()

    assert total(context + (grow == "context"), sequences + (grow == "sequences"), step + (grow == "step")) >= total(context, sequences, step)
