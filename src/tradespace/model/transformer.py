"""One Transformer for inference and training, over ragged steps: all tokens of all sequences one after the other, without padding.

Configured by its ModelSpec (families are data, `spec/families`), held as its WeightPlan says, computed by the kernels that the Plan names. Its parameters are
exactly `spec.tensors.model_tensors(spec)`. A shard of a model over several devices is a spec whose layers have fewer heads and feed-forward columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tradespace.errors import InputError, UnsupportedError
from tradespace.kernels.activation import SOFTCAPS
from tradespace.kernels.attention import Choice, make_kernels, resolve_kernels
from tradespace.kernels.rope import RopeRows, RopeTable
from tradespace.kernels.view import StepBatch
from tradespace.model.layer import Layer
from tradespace.model.parts import Parts, project
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import ModelSpec
from tradespace.spec.weights import WeightPlan

if TYPE_CHECKING:
    from tradespace.kv.cache import KVCache


# runs all layers for training, keeping less than all for the backward pass (`adapt.recompute`)
Recompute = Callable[["Transformer", Tensor, dict[Rope, RopeRows], StepBatch], Tensor]


class Transformer(nn.Module):
    """Weights are uninitialised until a loader (or `init`, for training from scratch) fills them; none is trainable until someone says so.

    `layers` is a list whose items may be replaced by wrappers of the same call: layer(h_TD, rope, batch, view) → h_TD.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: WeightPlan,
        *,
        attention: str | tuple[Choice, ...] = "sdpa",
        linear: str = "torch",
        activations: str = "auto",
        max_context: int,
        device: torch.device | str = "cpu",
    ):
        """`attention` names the kernel that is wanted in all layers (what each one got is in `attention_choices`), or says it layer by layer; `linear` names
        the kernel of products, norms and activations ("native": packed weights for `model.recorded`, multiplied by what `activations` says).
        Raises UnsupportedError for what cannot run.
        """
        super().__init__()
        if spec.plan_only is not None:
            raise UnsupportedError(f"{spec.name} cannot run yet: {spec.plan_only}. It can be planned for")
        if spec.tied and spec.lm_head_bias:
            raise UnsupportedError(f"{spec.name}: a head that is tied to the embedding and has a bias is priced but cannot run yet")
        if spec.learned_positions and max_context > spec.learned_positions - spec.position_offset:
            have = spec.learned_positions - spec.position_offset
            raise InputError(f"{spec.name} has learned positions for {have} tokens; a context of {max_context} was asked for. Ask for at most {have}")
        self.spec, self.plan, self.max_context = spec, plan, max_context
        parts = Parts(spec, plan, linear=linear, device=device, activations=activations)
        self.dtype, self.workspace = parts.dense, parts.workspace
        self._cap = SOFTCAPS[parts.linear]
        # rounded to the activations' dtype, as it was in training
        self.embed_scale = float(torch.tensor(spec.embed_scale, dtype=self.dtype))
        self.embed = parts.weight("embed")
        self.embed_norm = parts.norm("embed_norm")
        self.positions = parts.weight("positions") if spec.learned_positions else None
        self.attention_choices = resolve_kernels(spec, attention, self.dtype, device) if isinstance(attention, str) else attention
        attends = make_kernels(self.attention_choices)
        self.layers = nn.ModuleList(Layer(parts, index, layer, attends[index]) for index, layer in enumerate(spec.layers))
        self.final_norm = parts.norm("final_norm")
        self.lm_head = None if spec.tied else parts.weight("lm_head")
        self.layer_ropes: list[Rope | None] = [layer.mixer.rope if isinstance(layer.mixer, Attention) else None for layer in spec.layers]
        self.rope_tables = {rope: RopeTable(rope, max_context, device) for rope in dict.fromkeys(self.layer_ropes) if rope is not None}
        for layer, rope in zip(self.layers, self.layer_ropes, strict=True):
            if isinstance(layer, Layer) and layer.attn is not None and rope is not None:
                layer.attn.rope_table = self.rope_tables[rope]
        self.recompute: Recompute | None = None

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: StepBatch, cache: KVCache | None = None) -> Tensor:
        """hidden_TD, before the final norm (`logits` applies it to the rows that it is asked for).

        tokens_T and positions_T are int64, positions below `max_context`. With a cache the step's keys and values are written to `batch`'s slots and the
        sequences attend to what is cached before; without one they attend to the step alone, and gradients flow.
        """
        ropes = self.rope_rows(positions_T)
        # the embedded tokens get no name here: it would keep them as long as the layers run
        if self.recompute is not None:
            assert cache is None, "what is recomputed later has no cache"
            return self.recompute(self, self.embedded(tokens_T, positions_T), ropes, batch)
        return self.run_layers(self.embedded(tokens_T, positions_T), range(self.spec.L), ropes, batch, cache)

    def run_layers(self, h_TD: Tensor, which: range, ropes: dict[Rope, RopeRows], batch: StepBatch, cache: KVCache | None = None) -> Tensor:
        """Some consecutive layers."""
        for index in which:
            rope = self.layer_ropes[index]
            h_TD = self.layers[index](h_TD, None if rope is None else ropes[rope], batch, None if cache is None else cache.view(index))
        return h_TD

    def embedded(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """h_TD that the first layer gets."""
        h_TD = self.embed.rows(tokens_T).to(self.dtype)
        if self.embed_scale != 1.0:
            h_TD = h_TD * self.embed_scale
        if self.embed_norm is not None:
            h_TD = self.embed_norm(h_TD)
        if self.positions is not None:
            h_TD = h_TD + self.positions.rows(positions_T + self.spec.position_offset)
        return h_TD

    def rope_rows(self, positions_T: Tensor) -> dict[Rope, RopeRows]:
        """Angles of these positions for every rotary table."""
        return {rope: table.rows(positions_T, self.dtype) for rope, table in self.rope_tables.items()}

    def logits(self, hidden_TD: Tensor, rows: Tensor | None = None) -> Tensor:
        """logits_RV in fp32 of these rows of `forward`'s result (int64 indices; None: all of them)."""
        h_RD = hidden_TD if rows is None else hidden_TD[rows]
        if self.final_norm is not None:
            h_RD = self.final_norm(h_RD)
        logits_RV = project(self.embed if self.lm_head is None else self.lm_head, h_RD).float()
        if self.spec.logit_scale != 1.0:
            logits_RV = logits_RV * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            logits_RV = self._cap(logits_RV, self.spec.logit_softcap)
        return logits_RV

    @property
    def rope_nbytes(self) -> int:
        return sum(table.nbytes for table in self.rope_tables.values())
