"""What a kernel holds, measured by torch's own allocation record, against the ledger's closed forms; and √n where √n is promised."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._C._profiler import _EventType
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.attention_cases import make_case
from tradespace.kernels.attention import KERNELS, workspace_bytes
from tradespace.kernels.attention.chunked import attend as chunked
from tradespace.kernels.view import PackedView, StepBatch
from tradespace.spec.attention import chunk_size, refusal
from tradespace.spec.attention_workspace import tile_packing_bytes
from tradespace.spec.mixers import Attention


def peak_bytes(call) -> int:
    """Most bytes alive at once that `call` allocated, temporaries inside operators included; what it frees of others, such as garbage, is not its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = call()
    pending, records = list(prof.profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            records.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    alive: dict[int, int] = {}
    live = peak = 0
    for _, pointer, size in sorted(records, key=lambda record: record[0]):
        if size > 0:
            alive[pointer] = size
        live += size if size > 0 else -alive.pop(pointer, 0)
        peak = max(peak, live)
    del kept
    return peak


def test_garbage_collected_meanwhile_is_not_counted():
    """A tensor of an earlier measurement, in a cycle, freed in this one: its bytes must not hide ours."""

    class Cycle:
        def __init__(self):
            self.itself, self.tensor = self, torch.zeros(500_000)

    def collect_and_allocate():
        gc.collect()
        return torch.zeros(1_000_000)

    gc.collect()
    gc.disable()
    try:
        assert peak_bytes(lambda: (Cycle(), None)[1]) == 2_000_000
        assert peak_bytes(collect_and_allocate) == 4_000_000
    finally:
        gc.enable()


MIXERS = {
    "gqa": Attention(N=9, K=3, H=64),
    "mqa": Attention(N=16, K=1, H=128),
    "window": Attention(N=8, K=4, H=64, window=256),
    "narrow values": Attention(N=8, K=4, H=64, value_H=32),
    "softcap and sinks": Attention(N=8, K=4, H=64, logit_softcap=30.0, sinks=True),
}
STEPS = {
    "late chunk": [(1536, 300)],
    "decode one": [(2047, 1)],
    "decode many": [(1500 - 10 * i, 1) for i in range(12)],
    "drafts": [(200 + i, 4) for i in range(8)],
    "mixed": [(700, 300), (900, 1), (30, 1), (64, 1)],
}


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "contiguous"), (torch.bfloat16, "paged")])
@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("mixer", list(MIXERS))
def test_no_step_exceeds_its_bound(mixer, step, layout, dtype):
    spec, cuts = MIXERS[mixer], STEPS[step]
    case = make_case(spec, cuts, layout, dtype, 0)
    for name in ("reference", "chunked", "sdpa"):  # native attention is part of a recorded step, whose buffers tests/native measures
        if refusal(name, spec) is not None:
            continue
        kernel = KERNELS[name]()
        bound = workspace_bytes(
            name,
            spec,
            step_tokens=sum(new for _, new in cuts),
            max_context=max(before + new for before, new in cuts),
            max_sequences=len(cuts),
            kv_tokens=sum(before + new for before, new in cuts),
            element_bytes=dtype.itemsize,
            copies=layout == "paged",
            threads=1,
        )
        with torch.inference_mode():
            found = peak_bytes(lambda kernel=kernel: kernel(case.q_TNH, case.cache.view(0), case.batch, spec, case.sinks_N))
        assert found <= bound, f"{name} held {found:,} bytes; the formula allows {bound:,}"
        if step == "late chunk" or (step, name, mixer) == ("decode many", "sdpa", "gqa"):  # where there is much to hold the bound is no fantasy
            if name == "sdpa" and not torch.cpu._is_amx_tile_supported():  # what is packed for tiles is booked where there are none, too
                bound -= tile_packing_bytes(spec, sum(new for _, new in cuts), max(before + new for before, new in cuts), dtype.itemsize)
            assert bound <= 3 * found + 2**19, f"{name} held {found:,} bytes; the formula books {bound:,}"


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returned in storage of its own."""

    def __init__(self, known: tuple[torch.Tensor, ...]):
        super().__init__()
        self.elements, self._known = 0, {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self._known:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_chunked_holds_root_n_keys_per_query(num_tokens):
    """One head of size 4: the largest intermediate is queries · √n, while a score matrix would be queries · n."""
    q, k, v = (torch.randn(num_tokens, 1, 4) for _ in range(3))
    queries = num_tokens  # all at once: O(T·√n)
    with torch.inference_mode(), Largest((q, k, v)) as largest:
        chunked(q, PackedView(k, v), StepBatch.packed([num_tokens]), Attention(N=1, K=1, H=4), queries=queries)
    assert largest.elements == queries * chunk_size(num_tokens)
    with torch.inference_mode(), Largest((q, k, v)) as largest:
        chunked(q, PackedView(k, v), StepBatch.packed([num_tokens]), Attention(N=1, K=1, H=4))
    # by default 256 queries at a time; what is larger is the output (T · 4)
    assert largest.elements == max(256 * chunk_size(num_tokens), num_tokens * 4)


def test_the_measure_sees_a_score_matrix():
    """The same measure on the reference with one query tile less: it grows with n, so the test above can fail."""
    sizes = []
    for num_tokens in (512, 2048):
        q, k, v = (torch.randn(num_tokens, 1, 4) for _ in range(3))
        with torch.inference_mode(), Largest((q, k, v)) as largest:
            KERNELS["reference"]()(q, PackedView(k, v), StepBatch.packed([num_tokens]), Attention(N=1, K=1, H=4))
        sizes.append(largest.elements)
    assert sizes[1] == 4 * sizes[0]
