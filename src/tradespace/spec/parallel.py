"""How a model is cut over devices for training: which part of every tensor a rank holds. No torch.

tensor parallel   each of t ranks has 1/t of the heads and of the feed-forward's columns, and the stream whole: two sums over ranks a layer and pass.
                  arXiv:1909.08053
data parallel     each of d ranks computes its own sequences; weights, gradients and states lie in d parts by rows, and a layer is gathered while it runs
                  (fully sharded data parallel, FSDP2). arXiv:1910.02054, 2304.11277
Embedding, head and norms are whole on every tensor rank; norms on every data rank, too.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.tensors import TensorSpec


def split_refusal(spec: ModelSpec, tensor_parallel: int) -> str | None:
    """Why a model cannot be cut over so many tensor ranks, and over how many it could; None: it can."""
    if tensor_parallel == 1:
        return None
    most = 0
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mixer, Attention) or not isinstance(layer.ffn, DenseFFN):
            return f"layer {index} is not attention and a dense feed-forward"
        attn = layer.mixer
        if attn.qk_norm == "full":
            return f"layer {index} norms the queries of all heads together, and a rank has a part of them"
        if layer.arrangement not in ("pre", "sandwich", "post"):
            return f"layer {index} has the arrangement {layer.arrangement}"
        most = gcd(most, attn.K, attn.N, layer.ffn.F)
        for what, count in (("query heads", attn.N), ("key-value heads", attn.K), ("feed-forward columns", layer.ffn.F)):
            if count % tensor_parallel:
                able = ", ".join(str(t) for t in range(1, gcd(attn.K, attn.N, layer.ffn.F) + 1) if gcd(attn.K, attn.N, layer.ffn.F) % t == 0)
                return f"{tensor_parallel} ranks do not divide its {count} {what}. Fits with --tensor-parallel {able.replace(', ', ' or ')}"
    return None


def shard_spec(spec: ModelSpec, tensor_parallel: int) -> ModelSpec:
    """What one tensor rank builds: the same layers with fewer heads and columns."""
    if tensor_parallel == 1:
        return spec

    def cut(layer: LayerSpec) -> LayerSpec:
        assert isinstance(layer.mixer, Attention) and isinstance(layer.ffn, DenseFFN), "`split_refusal` was asked"
        mixer = replace(layer.mixer, N=layer.mixer.N // tensor_parallel, K=layer.mixer.K // tensor_parallel)
        return replace(layer, mixer=mixer, ffn=replace(layer.ffn, F=layer.ffn.F // tensor_parallel))

    return replace(spec, layers=tuple(cut(layer) for layer in spec.layers))


def tensor_part(spec: ModelSpec, tensor: TensorSpec, rank: int, tensor_parallel: int) -> tuple[int, tuple[range, ...]] | None:
    """(dimension, the ranges along it) of a tensor of the whole `spec` that a tensor rank holds; None: all of it."""
    if tensor.layer < 0 or tensor_parallel == 1:
        return None
    layer = spec.layers[tensor.layer]
    attn, ffn = layer.mixer, layer.ffn
    assert isinstance(attn, Attention) and isinstance(ffn, DenseFFN), "`split_refusal` was asked"
    stem = tensor.name.split(".")[-2]
    if stem == "qkv":
        sizes, dim = (attn.N * attn.H, attn.K * attn.H, attn.K * attn.Hv), 0
    elif stem in ("gate_up", "up"):
        sizes, dim = (ffn.F,) * (2 if ffn.gated else 1), 0
    elif stem == "out" and tensor.role == "attn_out":
        sizes, dim = (attn.N * attn.Hv,), 1
    elif stem == "down" and tensor.role == "down":
        sizes, dim = (ffn.F,), 1
    else:
        return None
    found, start = [], 0
    for size in sizes:
        part = size // tensor_parallel
        found.append(range(start + rank * part, start + (rank + 1) * part))
        start += size
    return dim, tuple(found)


def rows_of(rows: int, rank: int, data_parallel: int) -> range:
    """The rows that a data rank holds of a tensor with so many: equal parts, the last ones shorter or empty, as torch's `chunk` cuts.

    >>> [rows_of(10, rank, 4) for rank in range(4)]
    [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    """
    size = -(-rows // data_parallel)
    return range(min(rows, rank * size), min(rows, (rank + 1) * size))


def is_sharded(role: str) -> bool:
    """Whether data ranks hold parts of such a tensor."""
    return role != "norm"


def held_shape(tensor: TensorSpec, data_parallel: int, rank: int = 0) -> tuple[int, ...]:
    """Of what a data rank holds; rank 0 has the most."""
    if data_parallel == 1 or not is_sharded(tensor.role):
        return tensor.shape
    return (len(rows_of(tensor.shape[0], rank, data_parallel)), *tensor.shape[1:])
