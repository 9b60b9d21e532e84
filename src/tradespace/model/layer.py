"""One layer: tokens mix, features mix, and the arrangement says where the norms stand. Configured by its LayerSpec, never subclassed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tradespace.errors import UnsupportedError
from tradespace.formats import DenseWeight
from tradespace.kernels.attention import Attend
from tradespace.kernels.rope import RopeRows, RopeTable, rotate
from tradespace.kernels.view import KVView, PackedView, StepBatch
from tradespace.model.feed_forward import FEED_FORWARDS, FeedForward
from tradespace.model.parts import Norm, Parts, project
from tradespace.spec.mixers import Attention
from tradespace.spec.model import LayerSpec


class AttentionMixer(nn.Module):
    """Softmax attention: one fused product gives q, k and v; `attend` is the kernel."""

    def __init__(self, parts: Parts, name: str, mixer: Attention, attend: Attend):
        super().__init__()
        if mixer.output_gate or mixer.alibi:
            what = "an output gate" if mixer.output_gate else "linear position biases (ALiBi)"
            raise UnsupportedError(f"{parts.spec.name}: attention with {what} is priced but cannot run yet")
        self.mixer, self.attend = mixer, attend
        self.qkv = parts.weight(f"{name}.qkv")
        kind = "rms"  # heads are normalized by their RMS whatever the layer's norm is
        self.q_norm, self.k_norm = parts.norm(f"{name}.q_norm", kind=kind), parts.norm(f"{name}.k_norm", kind=kind)
        self.sinks = parts.vector(f"{name}.sinks")
        self.out = parts.weight(f"{name}.out")
        self.rope_table: RopeTable | None = None  # the Transformer's own; for keys that are projected again later

    def forward(self, x_TD: Tensor, rope: RopeRows | None, batch: StepBatch, view: KVView | None) -> Tensor:
        """out_TD. Without a `view` the step's own keys and values are all there is."""
        return self.mixed(project(self.qkv, x_TD, batch), x_TD, rope, batch, view)

    def mixed(self, qkv_TR: Tensor, x_TD: Tensor | None, rope: RopeRows | None, batch: StepBatch, view: KVView | None) -> Tensor:
        """What follows the product of queries, keys and values; x_TD, their input, matters to a cache that holds inputs alone."""
        mixer = self.mixer
        num_rotated = mixer.N + mixer.K
        # queries and keys lie side by side with the same head size: they rotate in one go
        qk_TR, v_TR = qkv_TR.split((num_rotated * mixer.H, mixer.K * mixer.Hv), dim=1)
        qk_TNH, v_TKH = qk_TR.unflatten(1, (num_rotated, mixer.H)), v_TR.unflatten(1, (mixer.K, mixer.Hv))
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = qk_TNH.split((mixer.N, mixer.K), dim=1)
            q_TNH, k_TKH = _normed(self.q_norm, q_TNH), _normed(self.k_norm, k_TKH)
            if rope is not None:
                q_TNH, k_TKH = rotate(q_TNH, rope), rotate(k_TKH, rope)
        else:
            if rope is not None:
                qk_TNH = rotate(qk_TNH, rope)
            q_TNH, k_TKH = qk_TNH.split((mixer.N, mixer.K), dim=1)
        if view is None:
            # for a gradient the values are kept: as a view they would keep queries and keys as they were before the rotation, too
            view = PackedView(k_TKH, v_TKH.contiguous() if v_TKH.requires_grad else v_TKH)
        elif view.holds_inputs:
            assert x_TD is not None, "training has no cache"
            view.take_inputs(x_TD, self.keys_values)
        view.write(k_TKH, v_TKH, batch)
        out_TNH = self.attend(q_TNH, view, batch, mixer, self.sinks)
        view.settle(batch)
        return project(self.out, out_TNH.flatten(1), batch)

    def keys_values(self, x_SD: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (S, K, H) and values (S, K, Hv) of inputs at any positions: the very product, norm and rotation of `forward`.

        Floats give the rows of keys and values alone; coded weights are multiplied whole, queries included, as their products are made.
        """
        mixer = self.mixer
        if isinstance(self.qkv, DenseWeight):
            rows, bias_R = self.qkv.weight[mixer.N * mixer.H :], self.qkv.bias
            kv_SR = self.qkv.kernel(x_SD.to(rows.dtype), rows, None if bias_R is None else bias_R[mixer.N * mixer.H :].to(rows.dtype)).to(x_SD.dtype)
        else:
            kv_SR = project(self.qkv, x_SD)[:, mixer.N * mixer.H :]
        k_SKH = kv_SR[:, : mixer.K * mixer.H].unflatten(1, (mixer.K, mixer.H))
        v_SKH = kv_SR[:, mixer.K * mixer.H :].unflatten(1, (mixer.K, mixer.Hv))
        if self.k_norm is not None:
            k_SKH = _normed(self.k_norm, k_SKH)
        return k_SKH if self.rope_table is None else rotate(k_SKH, self.rope_table.rows(positions_S, x_SD.dtype)), v_SKH


def _normed(norm: Norm, x_TNH: Tensor) -> Tensor:
    """Each head by itself, or the whole projection where the norm is as wide as that."""
    return norm(x_TNH) if len(norm.weight) == x_TNH.shape[-1] else norm(x_TNH.flatten(1)).view(x_TNH.shape)


# runs a function of one tensor
Section = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Plainly."""
    return function(x)


class Layer(nn.Module):
    """See `spec.model.Arrangement` for where the norms stand. Called as layer(h_TD, rope, batch, view), by itself: it may be wrapped from outside."""

    def __init__(self, parts: Parts, index: int, spec: LayerSpec, attend: Attend | None):
        super().__init__()
        name = f"layers.{index}"
        if spec.mixer is not None and not isinstance(spec.mixer, Attention):
            raise UnsupportedError(f"{parts.spec.name}: layer {index} mixes tokens by {type(spec.mixer).__name__}, which is priced but cannot run yet")
        self.arrangement, self.residual_scale = spec.arrangement, spec.residual_scale
        self.attn_norm = parts.norm(f"{name}.attn_norm")
        self.attn = None if spec.mixer is None or attend is None else AttentionMixer(parts, f"{name}.attn", spec.mixer, attend)
        self.attn_post_norm = parts.norm(f"{name}.attn_post_norm")
        self.ffn_norm = parts.norm(f"{name}.ffn_norm")
        self.ffn = None if spec.ffn is None else FEED_FORWARDS[type(spec.ffn)](parts, f"{name}.ffn", spec.ffn)
        self.ffn_post_norm = parts.norm(f"{name}.ffn_post_norm")
        # what runs a norm with the product behind it, and what lies between those: `adapt.recompute` puts its own in place
        self.around_norms: Section = run
        self.around_rest: Section = run

    def forward(self, h_TD: Tensor, rope: RopeRows | None, batch: StepBatch, view: KVView | None) -> Tensor:
        if self.arrangement in ("parallel", "parallel2") and self.attn is not None and self.ffn is not None:
            x_TD = _apply(self.attn_norm, h_TD)
            y_TD = self.attn(x_TD, rope, batch, view)
            return self._added(h_TD, y_TD.add_(self.ffn(x_TD if self.ffn_norm is None else self.ffn_norm(h_TD), batch)))
        if self.around_norms is not run:
            return self._by_sections(h_TD, rope, batch)
        if self.attn is not None:
            y_TD = self.attn(_apply(self.attn_norm, h_TD), rope, batch, view)
            h_TD = self._added(h_TD, _apply(self.attn_post_norm, y_TD))
        if self.ffn is not None:
            y_TD = self.ffn(_apply(self.ffn_norm, h_TD), batch)
            h_TD = self._added(h_TD, _apply(self.ffn_post_norm, y_TD))
        return h_TD

    def _by_sections(self, h_TD: Tensor, rope: RopeRows | None, batch: StepBatch) -> Tensor:
        """The same in four sections that each end with a matrix product: what a section takes is kept, what happens within it may be recomputed."""
        attn, ffn = self.attn, self.ffn
        assert attn is not None and isinstance(ffn, FeedForward), "checked where sections were asked for"
        qkv_TR = self.around_norms(lambda h_TD: project(attn.qkv, _apply(self.attn_norm, h_TD), batch), h_TD)
        y_TD = self.around_rest(lambda qkv_TR: attn.mixed(qkv_TR, None, rope, batch, None), qkv_TR)
        h_TD = self._added(h_TD, _apply(self.attn_post_norm, y_TD))
        wide = self.around_norms(lambda h_TD: ffn.widened(_apply(self.ffn_norm, h_TD), batch), h_TD)
        y_TD = self.around_rest(lambda wide: ffn.narrow(wide, batch), wide)
        return self._added(h_TD, _apply(self.ffn_post_norm, y_TD))

    def _added(self, h_TD: Tensor, y_TD: Tensor) -> Tensor:
        """h + scale · y, in y's memory: y is fresh and nothing's gradient needs it, while h may be kept for the backward pass."""
        return y_TD.add_(h_TD) if self.residual_scale == 1.0 else y_TD.mul_(self.residual_scale).add_(h_TD)


def _apply(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
