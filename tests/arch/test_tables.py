"""A technique has two homes, a spec entry and an implementation; what the spec says runs is there, and what it does not say is not."""

from dataclasses import replace

import torch

from tradespace.formats import FORMATS as HELD
from tradespace.kernels.attention import KERNELS as ATTENDS
from tradespace.kernels.attention import supports
from tradespace.kernels.linear import LINEAR
from tradespace.kv.cache import LAYOUTS, RETAIN
from tradespace.kv.cache import STORES as STORED
from tradespace.spec.attention import KERNELS, refusal
from tradespace.spec.formats import FORMATS
from tradespace.spec.kv import STORES, KVPlan, Retain
from tradespace.spec.mixers import Attention
from tradespace.spec.plan import LINEAR_KERNELS


def runs(entries) -> set[str]:
    return {name for name, entry in entries.items() if entry.runs_since is not None}


def test_weight_formats():
    assert set(HELD) == runs(FORMATS)


def test_cache_axes():
    assert set(STORED) == runs(STORES)
    assert set(RETAIN) == {kind for kind, since in Retain.RUNS_SINCE.items() if since is not None}
    assert {KVPlan(layout=layout).layout for layout in LAYOUTS} == set(LAYOUTS)


def test_attention_and_linear_kernels():
    assert set(ATTENDS) == runs(KERNELS)
    # the native product, and that of a CUDA step, belong to their packed weights (formats.native, formats.cuda)
    assert set(LINEAR) | {"native", "cuda"} == set(LINEAR_KERNELS)


def test_planner_and_kernels_refuse_the_same_layers():
    """The planner prices a kernel for a layer if and only if the kernel takes it (on a CPU, in fp32)."""
    plain = Attention(N=4, K=2, H=16)
    mixers = [plain, replace(plain, logit_softcap=30.0), replace(plain, sinks=True), replace(plain, alibi=True), replace(plain, window=8)]
    for kernel in ATTENDS:
        for mixer in mixers:
            assert (refusal(kernel, mixer) is None) == (supports(kernel, mixer, torch.float32) is None), (kernel, mixer)


def test_every_entry_runs():
    """By now each weight format, KV store and attention kernel that is priced has an implementation. One that does not would be left out of `runs`."""
    assert len(runs(FORMATS)) == len(FORMATS) > 40
    assert len(runs(STORES)) == len(STORES) > 10
    assert len(runs(KERNELS)) == len(KERNELS) > 4


def test_an_entry_that_does_not_run_is_left_out():
    """The checks above would say nothing if `runs` counted what is only priced."""
    assert runs({"now": replace(KERNELS["sdpa"], runs_since="0.1"), "later": replace(KERNELS["sdpa"], runs_since=None)}) == {"now"}
