"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads come from one cached latent vector per token.

The cache holds `kv_rank + rope_H` elements a token, whatever the number of heads; the price is two more products per layer. DeepSeek-V3.2's sparse index
(DSA) adds one small key per token, by which each query picks the `index_top_k` tokens that it attends to: the cache grows a little, the reads stop growing.
"""

from __future__ import annotations

from dataclasses import dataclass

from tradespace.spec.mixers import Rope, TensorShape


@dataclass(frozen=True, kw_only=True)
class SparseIndex:
    """The indexer of a layer: `N` small query heads of size `H` against one cached key of size `H`; `top_k` tokens are attended to."""

    N: int
    H: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """N heads; each query and key has `nope_H` elements without position and `rope_H` rotated ones, the latter shared by all heads on the key's side.

    q_rank: rank of the queries' own bottleneck; None: a plain projection. `index` is this layer's sparse index; `index_top_k` alone (without `index`)
    means that the layer reuses the choice of the layer before (GLM-5.2).
    """

    N: int
    kv_rank: int
    nope_H: int
    rope_H: int
    value_H: int
    q_rank: int | None = None
    rope: Rope | None = None
    scale: float | None = None
    bias: bool = False
    index: SparseIndex | None = None
    index_top_k: int | None = None
    output_gate: bool = False

    @property
    def window(self) -> int | None:
        return None

    @property
    def H(self) -> int:
        """Elements of one query or key."""
        return self.nope_H + self.rope_H

    @property
    def softmax_scale(self) -> float:
        return self.H**-0.5 if self.scale is None else self.scale

    @property
    def cache_elements_per_token(self) -> int:
        return self.kv_rank + self.rope_H + (self.index.H if self.index else 0)  # the latent, the shared rotated key, the index's key

    @property
    def state_bytes_per_sequence(self) -> int:
        return 0

    def tensors(self, D: int) -> tuple[TensorShape, ...]:
        found = []
        if self.q_rank is None:
            found.append(TensorShape("attn.q.weight", "qkv", (self.N * self.H, D)))
        else:
            found.append(TensorShape("attn.q_down.weight", "qkv", (self.q_rank, D)))
            if self.bias:
                found.append(TensorShape("attn.q_down.bias", "bias", (self.q_rank,)))
            found.append(TensorShape("attn.q_norm.weight", "norm", (self.q_rank,)))
            found.append(TensorShape("attn.q_up.weight", "qkv", (self.N * self.H, self.q_rank)))
        found.append(TensorShape("attn.kv_down.weight", "qkv", (self.kv_rank + self.rope_H, D)))
        if self.bias:
            found.append(TensorShape("attn.kv_down.bias", "bias", (self.kv_rank + self.rope_H,)))
        found.append(TensorShape("attn.kv_norm.weight", "norm", (self.kv_rank,)))
        found.append(TensorShape("attn.kv_up.weight", "qkv", (self.N * (self.nope_H + self.value_H), self.kv_rank)))
        if self.index is not None:
            found.append(TensorShape("attn.index.q.weight", "qkv", (self.index.N * self.index.H, self.q_rank or D)))
            found.append(TensorShape("attn.index.k.weight", "qkv", (self.index.H, D)))
            found += [TensorShape(f"attn.index.k_norm.{part}", "norm", (self.index.H,)) for part in ("weight", "bias")]
            found.append(TensorShape("attn.index.heads.weight", "qkv", (self.index.N, D)))
        if self.output_gate:
            found.append(TensorShape("attn.gate.weight", "qkv", (self.N * self.value_H, D)))
        found.append(TensorShape("attn.out.weight", "attn_out", (D, self.N * self.value_H)))
        if self.bias:
            found.append(TensorShape("attn.out.bias", "bias", (D,)))
        return tuple(found)
