"""Scales per input channel that cost nothing at run time: a linear's column j is multiplied by s_j, and what feeds it is divided by s_j.

What feeds a linear, and is linear itself in what is divided:
    a norm's weight (and bias)         → qkv, gate_up
    the value rows of qkv              → attn.out; the G query heads of a KV head share its scales
    the up rows of gate_up             → ffn.down, where the feed-forward is gated: down(act(gate) · up)
Elsewhere (an activation or a second norm stands between) there is no fold. In exact arithmetic the layer computes what it did before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Fold:
    """A linear whose input channels may be rescaled. `kind` says what feeds it; stems are relative to the layer ("attn.qkv"); `norm` feeds all of `linears`."""

    kind: str  # "norm", "value" or "up"
    linears: tuple[str, ...]
    feeder: str


def layer_folds(layer: LayerSpec) -> tuple[Fold, ...]:
    """The folds of a layer, in the order in which they are to be applied: what feeds others last, so that its own columns are already scaled."""
    found: list[Fold] = []
    attention = layer.mixer if isinstance(layer.mixer, Attention) else None
    ffn = layer.ffn if isinstance(layer.ffn, DenseFFN) else None
    wide = ("ffn.gate_up" if ffn.gated else "ffn.up") if ffn is not None else ""
    has_norm = layer.arrangement != "post"
    if attention is not None and not attention.value_from_keys:
        found.append(Fold("value", ("attn.out",), "attn.qkv"))
    if ffn is not None and ffn.gated:
        found.append(Fold("up", ("ffn.down",), wide))
    if layer.arrangement == "parallel":  # one norm feeds both parts
        both = (*(("attn.qkv",) if attention is not None else ()), *((wide,) if ffn is not None else ()))
        found.append(Fold("norm", both, "attn_norm"))
    elif has_norm:
        if attention is not None:
            found.append(Fold("norm", ("attn.qkv",), "attn_norm"))
        if ffn is not None:
            found.append(Fold("norm", (wide,), "ffn_norm"))
    return tuple(found)


def shared_scales(fold: Fold, layer: LayerSpec, scale_C: Tensor) -> Tensor:
    """`scale_C` made such that the feeder can take it: for values, the query heads of a KV head agree on their geometric mean."""
    if fold.kind != "value":
        return scale_C
    mixer = layer.mixer
    assert isinstance(mixer, Attention)
    log_KGH = scale_C.log().view(mixer.K, mixer.G, mixer.Hv)
    return log_KGH.mean(1, keepdim=True).expand_as(log_KGH).exp().reshape(-1)


def apply_fold(tensors: Tensors, prefix: str, fold: Fold, layer: LayerSpec, scale_C: Tensor, *, round_norm: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Multiplies the columns of the fold's linears by `scale_C` and divides what feeds them, in place. Returns the scales that were used.

    round_norm  rounds a norm's weight as it will be stored. The columns then get exactly what was taken from it: the rounding costs nothing.
    """
    if fold.kind == "norm":
        weight = tensors[f"{prefix}{fold.feeder}.weight"]
        rounded = round_norm(weight / scale_C)
        # a channel that its norm switches off, or whose quotient rounds to nothing, keeps its scale
        usable = (rounded != 0) & (weight != 0)
        scale_C = torch.where(usable, weight / torch.where(usable, rounded, 1.0), 1.0)
        weight.copy_(torch.where(usable, rounded, weight))
        bias = tensors.get(f"{prefix}{fold.feeder}.bias")
        if bias is not None:
            bias.div_(scale_C)
    else:
        rows = _fed_rows(tensors[f"{prefix}{fold.feeder}.weight"], fold, layer)
        shrink_R = scale_C
        if fold.kind == "value":
            mixer = layer.mixer
            assert isinstance(mixer, Attention)
            shrink_R = scale_C.view(mixer.K, mixer.G, mixer.Hv)[:, 0].reshape(-1)
        tensors[f"{prefix}{fold.feeder}.weight"][rows].div_(shrink_R[:, None])
        bias = tensors.get(f"{prefix}{fold.feeder}.bias")
        if bias is not None:
            bias[rows].div_(shrink_R)
    for linear in fold.linears:
        tensors[f"{prefix}{linear}.weight"].mul_(scale_C)
    return scale_C


def _fed_rows(weight_RC: Tensor, fold: Fold, layer: LayerSpec) -> slice:
    if fold.kind == "value":
        mixer = layer.mixer
        assert isinstance(mixer, Attention)
        return slice(len(weight_RC) - mixer.K * mixer.Hv, len(weight_RC))
    return slice(len(weight_RC) // 2, len(weight_RC))


def norm_rounding(dtype: torch.dtype, *, added: float) -> Callable[[Tensor], Tensor]:
    """How a norm's weight comes back from a checkpoint that stores it in `dtype`, less `added` (Gemma's 1)."""
    return lambda weight_C: (weight_C - added).to(dtype).float() + added
