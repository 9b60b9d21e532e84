"""Every tensor that a model holds, by name, role and shape: the one list that counts parameters, prices weights, builds the module and steers the loader.

Roles: embed, positions, qkv, attn_out, gate_up, down, experts, router, lm_head are matrices that a weight format may hold; norm and bias stay dense.
Fused on purpose: `qkv` is q, k, v stacked by rows, `gate_up` gate then up, because one wide product costs one launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec, RoutedFFN

MATRIX_ROLES = ("embed", "positions", "qkv", "attn_out", "gate_up", "down", "experts", "router", "state", "lm_head")
# what a weight format may hold; positions and routers are small and steer everything, so they stay dense
QUANTIZABLE_ROLES = ("embed", "qkv", "attn_out", "gate_up", "down", "experts", "state", "lm_head")
ROLES: tuple[str, ...] = (*MATRIX_ROLES, "norm", "bias")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: canonical name as in the built module's state dict, role, shape (output dimension first), layer (-1: outside of the layers)."""

    name: str
    role: str
    shape: tuple[int, ...]
    layer: int = -1

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def _norm(name: str, width: int, bias: bool, layer: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", "norm", (width,), layer)
    if bias:
        yield TensorSpec(f"{name}.bias", "norm", (width,), layer)


def _feed_forward(ffn: DenseFFN | RoutedFFN, D: int, prefix: str, layer: int) -> Iterator[TensorSpec]:
    up_name, up_rows = ("gate_up", 2) if ffn.gated else ("up", 1)
    if isinstance(ffn, DenseFFN):
        yield TensorSpec(f"{prefix}.{up_name}.weight", "gate_up", (up_rows * ffn.F, D), layer)
        if ffn.bias:
            yield TensorSpec(f"{prefix}.{up_name}.bias", "bias", (up_rows * ffn.F,), layer)
        yield TensorSpec(f"{prefix}.down.weight", "down", (D, ffn.F), layer)
        if ffn.bias:
            yield TensorSpec(f"{prefix}.down.bias", "bias", (D,), layer)
        return
    width = ffn.latent_D or D
    yield TensorSpec(f"{prefix}.router.weight", "router", (ffn.E, D), layer)
    if ffn.router_bias:
        yield TensorSpec(f"{prefix}.router.bias", "bias", (ffn.E,), layer)
    if ffn.score_bias:
        yield TensorSpec(f"{prefix}.router.score_bias", "bias", (ffn.E,), layer)
    if ffn.latent_D:
        yield TensorSpec(f"{prefix}.latent_in.weight", "gate_up", (ffn.latent_D, D), layer)
        yield TensorSpec(f"{prefix}.latent_out.weight", "down", (D, ffn.latent_D), layer)
    yield TensorSpec(f"{prefix}.experts.{up_name}.weight", "experts", (ffn.E, up_rows * ffn.F, width), layer)
    yield TensorSpec(f"{prefix}.experts.down.weight", "experts", (ffn.E, width, ffn.F), layer)
    if ffn.bias:
        yield TensorSpec(f"{prefix}.experts.{up_name}.bias", "bias", (ffn.E, up_rows * ffn.F), layer)
        yield TensorSpec(f"{prefix}.experts.down.bias", "bias", (ffn.E, width), layer)
    if ffn.shared_F:
        shared = DenseFFN(F=ffn.shared_F, activation=ffn.activation, gated=ffn.gated)
        yield from _feed_forward(shared, D, f"{prefix}.shared", layer)
    if ffn.shared_gate:
        yield TensorSpec(f"{prefix}.shared_gate.weight", "router", (1, D), layer)


def layer_tensors(model: ModelSpec, index: int) -> Iterator[TensorSpec]:
    """The tensors of layer `index`, in the order in which the forward pass touches them."""
    layer: LayerSpec = model.layers[index]
    prefix = f"layers.{index}"
    if layer.mixer is not None:
        if layer.arrangement != "post":
            yield from _norm(f"{prefix}.attn_norm", model.D, model.norm_bias, index)
        for tensor in layer.mixer.tensors(model.D):
            yield TensorSpec(f"{prefix}.{tensor.name}", tensor.role, tensor.shape, index)
        if layer.arrangement in ("sandwich", "post"):
            yield from _norm(f"{prefix}.attn_post_norm", model.D, model.norm_bias, index)
    if layer.ffn is not None:
        # the parallel arrangement has one norm for both parts
        if layer.arrangement in ("pre", "sandwich", "parallel2") or layer.mixer is None:
            yield from _norm(f"{prefix}.ffn_norm", model.D, model.norm_bias, index)
        yield from _feed_forward(layer.ffn, model.D, f"{prefix}.ffn", index)
        if layer.arrangement in ("sandwich", "post"):
            yield from _norm(f"{prefix}.ffn_post_norm", model.D, model.norm_bias, index)


@lru_cache(maxsize=64)
def model_tensors(model: ModelSpec) -> tuple[TensorSpec, ...]:
    """All tensors of `model`. A tied lm_head is the embedding and does not appear twice."""
    found = [TensorSpec("embed.weight", "embed", (model.V, model.D))]
    if model.embed_norm:
        found += _norm("embed_norm", model.D, model.norm_bias, -1)
    if model.learned_positions:
        found.append(TensorSpec("positions.weight", "positions", (model.learned_positions, model.D)))
    for index in range(model.L):
        found += layer_tensors(model, index)
    if model.final_norm:
        found += _norm("final_norm", model.D, model.norm_bias, -1)
    if not model.tied:
        found.append(TensorSpec("lm_head.weight", "lm_head", (model.V, model.D)))
    if model.lm_head_bias:
        found.append(TensorSpec("lm_head.bias", "bias", (model.V,)))
    return tuple(found)


@lru_cache(maxsize=64)
def num_parameters(model: ModelSpec) -> int:
    """Parameters of the decoder, exactly (what lies outside of it is `model.extra_parameters`)."""
    return sum(tensor.num_elements for tensor in model_tensors(model))


def parameters_by_role(model: ModelSpec) -> dict[str, int]:
    """Parameters per role, roles in the order of `ROLES`; roles that the model lacks are absent."""
    counts: dict[str, int] = dict.fromkeys(ROLES, 0)
    for tensor in model_tensors(model):
        counts[tensor.role] += tensor.num_elements
    return {role: count for role, count in counts.items() if count}


def active_parameters(model: ModelSpec) -> int:
    """Parameters that one token's pass multiplies with: of the routed experts only `top_k`; of the embedding table one row (unless it is the lm_head too)."""
    inactive = 0
    for tensor in model_tensors(model):
        if ".ffn.experts." in tensor.name:
            ffn = model.layers[tensor.layer].ffn
            assert isinstance(ffn, RoutedFFN), f"{tensor.name} in a layer without experts"
            inactive += tensor.num_elements * (ffn.E - ffn.top_k) // ffn.E
    if not model.tied:
        inactive += (model.V - 1) * model.D
    return num_parameters(model) - inactive
