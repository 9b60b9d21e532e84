"""A model's forward pass in float64 over its own fp32 weights: what two fp32 paths that differ from each other are both measured against.

Written plainly and apart from the kernels. Weights and the rotary tables are the model's, widened, so that what is left between this and an fp32 path is that
path's arithmetic: its order of summation, its exponentials. T tokens of one sequence at once: (N, T, T) scores and F · T numbers in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats import DenseWeight
from tradespace.kernels.activation.torch import FUNCTIONS
from tradespace.kernels.attention.pattern import visible
from tradespace.kernels.rope import RopeTable
from tradespace.model.feed_forward import FeedForward
from tradespace.model.layer import AttentionMixer, Layer
from tradespace.model.parts import Norm
from tradespace.model.transformer import Transformer

HEAD_ROWS = 16384  # of a head's that are in float64 at once


@torch.inference_mode()
def double_logits(model: Transformer, ids: Sequence[int], *, rows: int) -> Iterator[Tensor]:
    """Logits (≤ rows, V) in float64 after each of `ids`. Raises UnsupportedError for a model with parts that are not written here."""
    spec = model.spec
    if spec.norm != "rms" or model.positions is not None or model.embed_norm is not None or model.final_norm is None or spec.logit_softcap is not None:
        raise UnsupportedError(f"{spec.name}: float64 is written for RMS norms, rotary positions and plain logits")
    h_TD = _matrix(model.embed)[torch.tensor(ids)].double() * model.embed_scale
    for layer, rope in zip(model.layers, model.layer_ropes, strict=True):
        assert isinstance(layer, Layer), "nothing wraps the layers of a model that only predicts"
        h_TD = _layer(layer, h_TD, None if rope is None else model.rope_tables[rope])
    head_VD = _matrix(model.embed if model.lm_head is None else model.lm_head)
    for h_RD in _normed(model.final_norm, h_TD).split(rows):
        yield torch.cat([h_RD @ part_VD.double().T for part_VD in head_VD.split(HEAD_ROWS)], dim=1) * spec.logit_scale


def _matrix(weight: object) -> Tensor:
    if not isinstance(weight, DenseWeight) or weight.weight.dtype != torch.float32:
        raise UnsupportedError(f"float64 reads weights in fp32, not {type(weight).__name__}. Open the model with weights fp32")
    return weight.weight


def _project(weight: object, x_TC: Tensor) -> Tensor:
    bias_R = getattr(weight, "bias", None)
    return F.linear(x_TC, _matrix(weight).double(), None if bias_R is None else bias_R.double())


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    y = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    return y if norm.bias is None else y + norm.bias.double()


def _layer(layer: Layer, h_TD: Tensor, rope: RopeTable | None) -> Tensor:
    """`spec.model.Arrangement` says where norms stand; those that a layer does not have are None."""
    if layer.arrangement in ("parallel", "parallel2"):
        raise UnsupportedError("float64 is not written for layers whose parts run side by side")
    for part, before, after in ((layer.attn, layer.attn_norm, layer.attn_post_norm), (layer.ffn, layer.ffn_norm, layer.ffn_post_norm)):
        if part is None:
            continue
        x_TD = _normed(before, h_TD)
        y_TD = _attention(part, x_TD, rope) if isinstance(part, AttentionMixer) else _feed_forward(part, x_TD)
        h_TD = h_TD + layer.residual_scale * _normed(after, y_TD)
    return h_TD


def _attention(part: AttentionMixer, x_TD: Tensor, rope: RopeTable | None) -> Tensor:
    mixer = part.mixer
    if part.sinks is not None or mixer.logit_softcap is not None:
        raise UnsupportedError("float64 is written for attention without sinks and soft caps")
    qkv_TR, positions_T = _project(part.qkv, x_TD), torch.arange(len(x_TD))
    q_TNH, k_TKH = (x.unflatten(1, (-1, mixer.H)) for x in qkv_TR[:, : (mixer.N + mixer.K) * mixer.H].split([mixer.N * mixer.H, mixer.K * mixer.H], 1))
    v_TKH = qkv_TR[:, (mixer.N + mixer.K) * mixer.H :].unflatten(1, (mixer.K, mixer.Hv))
    q_TNH, k_TKH = (_rotated(_normed(norm, x), rope) for norm, x in ((part.q_norm, q_TNH), (part.k_norm, k_TKH)))
    k_TNH, v_TNH = (x.repeat_interleave(mixer.G, dim=1) for x in (k_TKH, v_TKH))
    scores_NTS = torch.einsum("tnh,snh->nts", q_TNH, k_TNH) * mixer.softmax_scale
    scores_NTS.masked_fill_(~visible(mixer, positions_T, positions_T), float("-inf"))
    return _project(part.out, torch.einsum("nts,snh->tnh", scores_NTS.softmax(-1), v_TNH).flatten(1))


def _rotated(x_TNH: Tensor, rope: RopeTable | None) -> Tensor:
    if rope is None:
        return x_TNH
    cos_T1P, sin_T1P = rope.table_SH2[: len(x_TNH), None].double().unbind(-1)
    dims = 2 * cos_T1P.shape[-1]
    turned, rest = x_TNH[..., :dims], x_TNH[..., dims:]
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if rope.rope.interleaved else turned.chunk(2, dim=-1)
    pair = (a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P)
    return torch.cat((torch.stack(pair, -1).flatten(-2) if rope.rope.interleaved else torch.cat(pair, -1), rest), dim=-1)


def _feed_forward(part: object, x_TD: Tensor) -> Tensor:
    if not isinstance(part, FeedForward):
        raise UnsupportedError(f"float64 is not written for {type(part).__name__}")
    wide, function = _project(getattr(part, part.wide), x_TD), FUNCTIONS[part.ffn.activation]
    gate, up = wide.chunk(2, dim=-1) if part.ffn.gated else (wide, None)
    return _project(part.down, function(gate) if up is None else function(gate) * up)
