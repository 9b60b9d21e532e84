"""`ts.testing.check` passes what is ours and finds what is broken."""

from __future__ import annotations

import pytest
import torch

import tradespace as ts
from tradespace.errors import InputError
from tradespace.formats import FORMATS, Codes
from tradespace.kv.retain.h2o import H2O
from tradespace.kv.retain.snapkv import SnapKV
from tradespace.quantize.rtn import round_to_nearest
from tradespace.spec.formats import ALIASES
from tradespace.spec.kv_retain import Retain

CODED = sorted(name for name, fmt in FORMATS.items() if fmt.codec is not None and name not in ALIASES)


class Loud:
    budget, protected = 16, 4

    def weigh_last(self, num_queries):
        return num_queries

    def score(self, old_KS, weights_KS, positions_KS, num_queries):
        return torch.maximum(old_KS, weights_KS)


@pytest.mark.parametrize("policy", [H2O(Retain(kind="h2o", budget=16)), SnapKV(Retain(kind="snapkv", budget=40, window=8)), Loud()])
def test_our_policies_pass(policy):
    assert "none of the protected lost" in ts.testing.check(policy)[-1]


def _changed(**methods):
    return type("Broken", (Loud,), methods)()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (_changed(protected=16), "protected below budget"),
        (_changed(weigh_last=lambda self, n: n + 1), "weigh_last"),
        (_changed(score=lambda self, o, w, p, n: (o + w)[:, :-1]), "shape"),
        (_changed(score=lambda self, o, w, p, n: (o + w) / 0), "not finite"),
        (_changed(score=lambda self, o, w, p, n: torch.rand_like(o)), "another answer"),
        (_changed(score=lambda self, o, w, p, n: o.add_(w).clone()), "another answer|changed its input"),
        (_changed(score=lambda self, o, w, p, n: w * 0 + w.sum(0) + w.cumsum(0)), "depend on the other heads"),
    ],
)
def test_broken_policies_are_found(broken, words):
    with pytest.raises(AssertionError, match=words):
        ts.testing.check(broken)


@pytest.mark.parametrize("name", CODED)
def test_our_codecs_and_quantizers_pass(name):
    codec = FORMATS[name].codec
    assert codec is not None
    if codec.fmt.scale_rows == 1 and not name.startswith("nf4"):
        assert ts.testing.check(codec)
    assert ts.testing.check(lambda values_RC, fmt: round_to_nearest(fmt.name, values_RC), format=name)


def _int8(values_RC, fmt, gain=1.0):
    scale_R1 = values_RC.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return Codes((values_RC / scale_R1).round().clamp(-127, 127).to(torch.int8), scale_R1 * gain)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda v, f: _int8(v, f, 1.1), "rounding to nearest has"),
        (lambda v, f: _int8(v.mul_(1), f)[:-1], "Codes of"),
        (lambda v, f: _int8(v.add_(1), f), "changed its input"),
        (lambda v, f: _int8(v, f, float("nan")), "finite"),
        (lambda v, f: v, "must return Codes"),
    ],
)
def test_broken_quantizers_are_found(broken, words):
    with pytest.raises(AssertionError, match=words):
        ts.testing.check(broken, format="int8")


def test_a_codec_that_forgets_is_found():
    good = FORMATS["int4-g32"].codec
    assert good is not None

    class Forgetful:
        fmt = good.fmt

        def __getattr__(self, name):
            return getattr(good, name)

        def pack(self, codes):
            return good.pack(Codes(codes.codes_RC // 2 * 2, codes.scale_RG, codes.zero_RG))

        def unpack(self, parts, columns):
            return good.unpack(parts, columns)

    with pytest.raises(AssertionError, match="other codes"):
        ts.testing.check(Forgetful())


def test_what_is_none_of_these_is_said():
    with pytest.raises(InputError, match="no policy"):
        ts.testing.check(3)
    with pytest.raises(InputError, match="format="):
        ts.testing.check(_int8)
