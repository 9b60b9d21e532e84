"""`ts.testing.check(object)`: the conformance checks of a user's own KV policy, weight codec or quantizer, against what this project's own ones are held to.

What the object is follows from what it has: `weigh_last` and `score` make a policy of eviction, `pack` and `unpack` a codec, a function a quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.formats import FORMATS, Codes, decode
from tradespace.formats.quantized import QuantizedWeight
from tradespace.spec.formats import find_format

__all__ = ["check"]

_SHAPES = ((8, 256), (5, 512), (1, 1024))


def check(thing: Any, *, format: str | None = None, seed: int = 0) -> list[str]:
    """Runs the checks that belong to `thing` and returns a line for each that it passed.

    format: for a quantizer, the weight format that it fills (a name of `tradespace plan --weights`).
    Raises AssertionError with the first thing that is wrong and the input that shows it; InputError where `thing` is of no kind that we know.
    """
    generator = torch.Generator().manual_seed(seed)
    if hasattr(thing, "weigh_last") and hasattr(thing, "score"):
        return list(_policy(thing, generator))
    if hasattr(thing, "pack") and hasattr(thing, "unpack"):
        return list(_codec(thing, generator))
    if callable(thing):
        if format is None:
            raise InputError("a quantizer is checked against the format that it fills: check(function, format='int8')")
        return list(_quantizer(thing, format, generator))
    raise InputError(f"{type(thing).__name__} is no policy (weigh_last, score), no codec (pack, unpack) and no quantizer (a function of values and a format)")


# ------------------------------------------------------------------------------------------------------------------ eviction


def _policy(policy: Any, generator: torch.Generator) -> Iterator[str]:
    budget, protected = policy.budget, policy.protected
    assert isinstance(budget, int) and isinstance(protected, int) and 0 <= protected < budget, (
        f"budget and protected are whole numbers of tokens, protected below budget; got {budget!r} and {protected!r}"
    )
    yield f"budget {budget} tokens, the last {protected} protected"
    for num_queries in (1, 3, 17):
        asked = policy.weigh_last(num_queries)
        assert isinstance(asked, int) and 0 <= asked <= num_queries, f"weigh_last({num_queries}) is {asked!r}: between 0 and {num_queries} queries have weights"
    yield "weigh_last asks for no more queries than a step has"
    for heads, old, own in ((1, 0, 1), (2, 5, 3), (3, budget, 1), (2, budget, budget + 7)):
        yield from _scored(policy, heads, old, own, generator)
    yield "scores: one finite number a head and token, the same for the same input, input left as it was"
    yield from _kept(policy, generator)


def _weights(heads: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Attention weights summed over queries: what a kernel hands a policy."""
    return torch.rand(heads, tokens, generator=generator).softmax(dim=1)


def _scored(policy: Any, heads: int, old: int, own: int, generator: torch.Generator) -> Iterator[str]:
    tokens = old + own
    old_KS = torch.cat([torch.rand(heads, old, generator=generator), torch.zeros(heads, own)], dim=1)
    weights_KS = _weights(heads, tokens, generator) if policy.weigh_last(own) else None
    positions_KS = torch.arange(tokens).expand(heads, -1)
    before = old_KS.clone(), None if weights_KS is None else weights_KS.clone()
    first, second = (policy.score(old_KS, weights_KS, positions_KS, own) for _ in range(2))
    where = f"score of {heads} heads, {old} old tokens and {own} of the step"
    assert isinstance(first, Tensor) and first.shape == (heads, tokens), f"{where}: shape {tuple(getattr(first, 'shape', ()))}, must be {(heads, tokens)}"
    assert bool(first.isfinite().all()), f"{where}: not finite"
    assert torch.equal(first, second), f"{where}: another answer to the same question"
    same_weights = weights_KS is None or before[1] is None or torch.equal(weights_KS, before[1])
    assert torch.equal(old_KS, before[0]) and same_weights, f"{where}: changed its input"
    order = torch.randperm(heads, generator=generator)
    mixed = policy.score(old_KS[order], None if weights_KS is None else weights_KS[order], positions_KS[order], own)
    assert torch.allclose(mixed, first[order], rtol=1e-5, atol=1e-6), f"{where}: a head's scores depend on the other heads"
    yield from ()


def _kept(policy: Any, generator: torch.Generator) -> Iterator[str]:
    """Replays an eviction over 40 steps as the cache does it, and looks at what stays."""
    positions, scores = torch.arange(0), torch.zeros(0)
    for step in range(policy.budget + 40):
        tokens = torch.cat([positions, torch.tensor([step])])
        old_1S = torch.cat([scores, torch.zeros(1)]).unsqueeze(0)
        weights_1S = _weights(1, len(tokens), generator) if policy.weigh_last(1) else None
        found = policy.score(old_1S, weights_1S, tokens.unsqueeze(0), 1)[0]
        ranked = found.clone()
        ranked[tokens > step - policy.protected] = float("inf")
        stay = ranked.argsort(descending=True, stable=True)[: policy.budget].sort().values
        positions, scores = tokens[stay], found[stay]
        recent = set(range(max(0, step - policy.protected + 1), step + 1))
        assert len(positions) <= policy.budget and recent <= set(positions.tolist()), f"step {step}: lost a protected token"
    yield f"{policy.budget + 40} steps: never more than {policy.budget} tokens, none of the protected lost"


# ------------------------------------------------------------------------------------------------------------------ formats


def _same(one: Tensor, two: Tensor) -> bool:
    """Bit for bit, as random bytes may stand for infinities."""
    return one.shape == two.shape and torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


def _random(part: Any, rows: int, generator: torch.Generator) -> Tensor:
    """What a part may hold: any byte, or positive floats; as many rows as share what it states."""
    rows = rows if part.scale_rows == 1 else -(-rows // part.scale_rows) if part.scale_rows else 1
    if part.dtype in (torch.uint8, torch.int8):
        return torch.randint(0, 256, (rows, part.columns), generator=generator, dtype=torch.uint8).view(part.dtype)
    return (0.5 + torch.rand(rows, part.columns, generator=generator)).to(part.dtype)


def _codec(codec: Any, generator: torch.Generator) -> Iterator[str]:
    fmt = codec.fmt
    for rows, columns in _SHAPES:
        where = f"{fmt.name}, {rows} × {columns}"
        weight = QuantizedWeight(codec, (rows, columns), torch.float32, device="cpu", linear="torch", workspace=None)
        assert weight.nbytes == fmt.nbytes((rows, columns)), f"{where}: holds {weight.nbytes} bytes, its spec says {fmt.nbytes((rows, columns))}"
        parts = {name: _random(part, rows, generator) for name, part in codec.parts(columns).items()}
        codes = codec.unpack(parts, columns)
        again = codec.unpack(codec.pack(codes), columns)
        assert _same(codes.codes_RC, again.codes_RC), f"{where}: unpack(pack(codes)) are other codes"
        for name in ("scale_RG", "zero_RG", "nested_RG"):
            one, two = getattr(codes, name), getattr(again, name)
            assert (one is None) == (two is None) and (one is None or torch.equal(one, two)), f"{where}: unpack(pack(codes)) has another {name}"
        first, second = torch.zeros(rows, columns), torch.full((rows, columns), 7.0)
        codec.decode(codes, first)
        codec.decode(again, second)
        assert _same(first, second), f"{where}: decode does not write every element the same way"
        single = torch.empty(1, columns)
        codec.decode(codes[rows - 1 : rows], single)
        assert _same(single[0], first[-1]), f"{where}: a row's values depend on the rows beside it"
    yield f"{fmt.name}: bytes as its spec says, codes survive packing, decode is complete and row by row"


def _quantizer(quantizer: Any, name: str, generator: torch.Generator) -> Iterator[str]:
    fmt = find_format(name)
    codec = FORMATS[name].codec if name in FORMATS else None
    if codec is None:
        raise InputError(f"{name} holds floats or cannot run yet: there is nothing to quantize to")
    from tradespace.quantize.rtn import round_to_nearest

    for rows, columns in _SHAPES:
        values_RC = torch.randn(rows, columns, generator=generator)
        before, where = values_RC.clone(), f"{name}, {rows} × {columns}"
        codes = quantizer(values_RC, fmt)
        assert torch.equal(values_RC, before), f"{where}: changed its input"
        assert isinstance(codes, Codes) and len(codes) == rows, f"{where}: must return Codes of {rows} rows"
        held = codec.unpack(codec.pack(codes), columns)
        found = decode(name, held)
        assert found.shape == values_RC.shape and bool(found.isfinite().all()), f"{where}: decodes to {tuple(found.shape)}, or not to finite numbers"
        error = float((found - values_RC).square().mean().sqrt())
        nearest = float((decode(name, round_to_nearest(name, values_RC)) - values_RC).square().mean().sqrt())
        assert error <= max(4 * nearest, 1e-6), f"{where}: error {error:.4g}, rounding to nearest has {nearest:.4g}: are codes and scales those of the format?"
        zeros = decode(name, quantizer(torch.zeros(rows, columns), fmt))
        assert bool(zeros.isfinite().all()) and float(zeros.abs().max()) < 1e-3, f"{where}: a matrix of zeros does not stay one"
    yield f"{name}: codes are the format's, survive packing, lose at most four times what rounding to nearest loses; zeros stay zeros"
