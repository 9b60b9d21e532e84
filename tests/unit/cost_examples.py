"""Small models and devices whose costs can be computed by hand."""

from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan
from tradespace.units import GiB


def tiny_model(
    *, L: int = 2, D: int = 64, V: int = 128, N: int = 4, K: int = 2, H: int = 16, F: int = 128, window: int | None = None, tied: bool = True
) -> ModelSpec:
    layer = LayerSpec(mixer=Attention(N=N, K=K, H=H, rope=Rope(dims=H), window=window), ffn=DenseFFN(F=F))
    return ModelSpec(name="tiny", family="llama", D=D, V=V, layers=(layer,) * L, max_context=4096, tied=tied)


def cpu(**changes) -> DeviceSpec:
    values = {
        "name": "test-cpu",
        "kind": "cpu",
        "memory_bytes": 8 * GiB,
        "free_bytes": 8 * GiB,
        "read_bytes_per_s": Estimate(10e9, "cited: test"),
        "matmul_flops_per_s": {"fp32": Estimate(1e12, "cited: test")},
        "op_overhead_s": Estimate(1e-6, "cited: test"),
        "runtime_bytes": Estimate(1_000_000, "measured"),
    }
    return DeviceSpec(**(values | changes))


def gpu(**changes) -> DeviceSpec:
    values = {
        "kind": "cuda",
        "name": "test-gpu",
        "matmul_flops_per_s": {"fp32": Estimate(10e12, "cited: test"), "bf16": Estimate(100e12, "cited: test")},
        "host_link_bytes_per_s": Estimate(1e9, "cited: test"),
        "peer_link_bytes_per_s": Estimate(50e9, "cited: test"),
    }
    return cpu(**(values | changes))


def tiny_plan(**changes) -> Plan:
    values = {
        "model": "tiny",
        "weights": WeightPlan(default="fp32"),
        "kv": KVPlan(layout="contiguous", store="fp32"),
        "attention": "sdpa",
        "max_sequences": 2,
        "max_context": 64,
        "step_tokens": 32,
        "kv_tokens": 128,
    }
    return Plan(**(values | changes))
