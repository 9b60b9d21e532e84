"""What mixes features within a token: one feed-forward, or a few of many that a router picks. The layer's spec decides by its type (`FEED_FORWARDS`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tradespace.errors import UnsupportedError
from tradespace.formats import Weight
from tradespace.kernels.activation import ACTIVATIONS
from tradespace.kernels.view import StepBatch
from tradespace.model.parts import Parts, project
from tradespace.spec.model import DenseFFN, RoutedFFN


class FeedForward(nn.Module):
    """down(act(gate) · up) from one fused product where gated, else down(act(up))."""

    def __init__(self, parts: Parts, name: str, ffn: DenseFFN):
        super().__init__()
        self.ffn, self.activate = ffn, ACTIVATIONS[parts.linear]
        self.wide = "gate_up" if ffn.gated else "up"
        setattr(self, self.wide, parts.weight(f"{name}.{self.wide}"))
        self.down: Weight = parts.weight(f"{name}.down")

    def forward(self, x_TD: Tensor, batch: StepBatch | None = None) -> Tensor:
        return self.narrow(self.widened(x_TD, batch), batch)

    def widened(self, x_TD: Tensor, batch: StepBatch | None) -> Tensor:
        """The wide product: gate and up side by side, or up alone."""
        return project(getattr(self, self.wide), x_TD, batch)

    def narrow(self, wide: Tensor, batch: StepBatch | None) -> Tensor:
        """What follows the wide product."""
        return project(self.down, self.activate(wide, self.ffn.activation, self.ffn.gated), batch)


class Experts(nn.Module):
    """The stacked matrices of all experts: (E, rows, columns) each, biases (E, rows)."""

    def __init__(self, parts: Parts, name: str, ffn: RoutedFFN):
        super().__init__()
        self.ffn, self.activate = ffn, ACTIVATIONS[parts.linear]
        self.wide = "gate_up" if ffn.gated else "up"
        setattr(self, self.wide, parts.weight(f"{name}.{self.wide}"))
        self.down: Weight = parts.weight(f"{name}.down")

    def one(self, expert: int, x_TD: Tensor) -> Tensor:
        """Expert number `expert` on the tokens that it got."""
        wide: Weight = getattr(self, self.wide)
        down = self.down
        hidden = wide.linear(x_TD, None if wide.bias is None else wide.bias[expert], expert=expert)
        hidden = self.activate(hidden, self.ffn.activation, self.ffn.gated)
        return down.linear(hidden, None if down.bias is None else down.bias[expert], expert=expert)


class RoutedFeedForward(nn.Module):
    """The `top_k` likeliest experts of each token, weighted by their softmax over those (Mixtral, arXiv:2401.04088), plus the shared expert.

    One product per expert that got a token: right, and as fast as its loop allows.
    """

    def __init__(self, parts: Parts, name: str, ffn: RoutedFFN):
        super().__init__()
        if ffn.score_bias or ffn.latent_D:
            raise UnsupportedError(f"{parts.spec.name}: routed feed-forwards with a score bias or a latent width are priced but cannot run yet")
        self.ffn = ffn
        self.router = parts.weight(f"{name}.router")
        self.experts = Experts(parts, f"{name}.experts", ffn)
        shared = DenseFFN(F=ffn.shared_F, activation=ffn.activation, gated=ffn.gated)
        self.shared = FeedForward(parts, f"{name}.shared", shared) if ffn.shared_F else None
        self.shared_gate = parts.weight(f"{name}.shared_gate") if ffn.shared_gate else None

    def forward(self, x_TD: Tensor, batch: StepBatch | None = None) -> Tensor:
        scores_TE = project(self.router, x_TD).float()
        top_TK, experts_TK = scores_TE.topk(self.ffn.top_k, dim=-1)
        shares_TK = top_TK.softmax(dim=-1).to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for expert in experts_TK.unique().tolist():
            tokens, places = (experts_TK == expert).nonzero(as_tuple=True)
            out_TD = out_TD.index_add(0, tokens, self.experts.one(expert, x_TD[tokens]) * shares_TK[tokens, places, None])
        if self.shared is None:
            return out_TD
        shared_TD = self.shared(x_TD)
        return out_TD + (shared_TD if self.shared_gate is None else shared_TD * project(self.shared_gate, x_TD).sigmoid())


FEED_FORWARDS = {DenseFFN: FeedForward, RoutedFFN: RoutedFeedForward}
