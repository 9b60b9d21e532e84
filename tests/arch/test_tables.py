"""A technique has two homes, a spec entry and an implementation; what the spec says runs is there, and what it does not say is not."""

from tradespace.formats import FORMATS as HELD
from tradespace.kernels.attention import KERNELS as ATTENDS
from tradespace.kernels.linear import LINEAR
from tradespace.kv.cache import LAYOUTS, RETAIN
from tradespace.kv.cache import STORES as STORED
from tradespace.spec.attention import KERNELS
from tradespace.spec.kv import STORES, KVPlan, Retain
from tradespace.spec.plan import LINEAR_KERNELS
from tradespace.spec.weights import FORMATS


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
    assert set(LINEAR) == set(LINEAR_KERNELS)


def test_something_is_priced_that_does_not_run_yet():
    """The check above would say nothing if every entry ran or none did."""
    assert 0 < len(runs(FORMATS)) < len(FORMATS)
    assert 0 < len(runs(STORES)) < len(STORES)
