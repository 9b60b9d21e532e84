"""Which rows of which stored tensor make up each tensor of ours. One table per source of names; nothing is read here.

A `Piece` is one stored tensor, whole: it fills `num_rows` rows of its target from `row_start` on. Where checkpoints hold q, k and v fused in another order, the
stored rows are sent to their places by `order`; where they hold a matrix as (in, out), as GPT-2's Conv1D does, it is `transposed`. Gemma's norms are stored as
w and applied as 1 + w: the 1 is `added` in fp32, so that what is held is what multiplies. A GGUF file has that 1 already, and its query and key rows keep their
order: `spec/gguf_config` says so in the spec (norm_plus_one, Rope.interleaved).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from tradespace.errors import UnsupportedError
from tradespace.spec.gguf_config import ROPE_TENSORS, gguf_tensor_parts
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, ModelSpec
from tradespace.spec.tensors import TensorSpec, model_tensors

# how the rows of a stored qkv lie: q, k, v one after the other; or per KV head its G queries, its key, its value
Order = Literal["stacked", "by_kv_head"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One stored tensor and where it goes. `num_rows` and `num_columns` are the target's; a vector is a column of single elements."""

    source: str
    target: str
    row_start: int
    num_rows: int
    num_columns: int
    order: Order = "stacked"
    heads: tuple[int, int, int] = (0, 0, 0)  # G, K, H of a "by_kv_head" order
    transposed: bool = False
    added: float = 0.0

    @property
    def is_vector(self) -> bool:
        return self.num_columns == 0

    @property
    def source_shape(self) -> tuple[int, ...]:
        if self.is_vector:
            return (self.num_rows,)
        return (self.num_columns, self.num_rows) if self.transposed else (self.num_rows, self.num_columns)

    def target_row(self, row: int) -> int:
        """Where stored row `row` goes, relative to `row_start`.

        >>> piece = Piece(source="", target="", row_start=0, num_rows=8, num_columns=1, order="by_kv_head", heads=(2, 2, 1))
        >>> [piece.target_row(row) for row in range(8)]  # q0 q1 k0 v0 q2 q3 k1 v1 → q0 q1 q2 q3 k0 k1 v0 v1
        [0, 1, 4, 6, 2, 3, 5, 7]
        """
        if self.order == "stacked":
            return row
        G, K, H = self.heads
        head, offset = divmod(row, H)
        kv_head, place = divmod(head, G + 2)
        if place < G:
            found = kv_head * G + place
        else:
            found = G * K + (place - G) * K + kv_head
        return found * H + offset


_LLAMA = {
    "embed": "embed_tokens",
    "final_norm": "norm",
    "layers": "layers",
    "attn_norm": "input_layernorm",
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": "mlp.down_proj",
}
_GEMMA = _LLAMA | {"attn_post_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
_PHI = _LLAMA | {"attn.qkv": "self_attn.qkv_proj", "ffn.gate_up": "mlp.gate_up_proj"}
_GPT = {
    "embed": "wte",
    "positions": "wpe",
    "final_norm": "ln_f",
    "layers": "h",
    "attn_norm": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}
_FALCON = {
    "embed": "word_embeddings",
    "final_norm": "ln_f",
    "layers": "h",
    "attn_norm": "input_layernorm",
    "attn.qkv": "self_attention.query_key_value",
    "attn.out": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn.up": "mlp.dense_h_to_4h",
    "ffn.down": "mlp.dense_4h_to_h",
}
# family → our stem to theirs; several stored tensors are stacked by rows
NAMES: dict[str, Mapping[str, str | tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _GEMMA),
    "phi3": _PHI,
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT),
    "falcon": _FALCON,
}
# what stands before the decoder's names: with a head, within a model with eyes (two eras), or the bare decoder
PREFIXES = ("model.", "transformer.", "model.language_model.", "language_model.model.", "")
# stored by some and computed by all: rotary frequencies and causal masks
HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|self_attn\.rotary_emb\.(cos|sin)_cached)")
EYES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")


def hugging_face_pieces(spec: ModelSpec, stored: Collection[str]) -> tuple[Piece, ...]:
    """The pieces of a checkpoint with Hugging Face names; `stored` only tells which prefix it has. Raises UnsupportedError for a family without a table."""
    if spec.family not in NAMES:
        raise UnsupportedError(f"{spec.name}: no table of tensor names for family {spec.family}. Loads: {', '.join(NAMES)}")
    names = NAMES[spec.family]
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}{names['embed']}.weight" in stored), PREFIXES[0])
    found: list[Piece] = []
    for tensor in model_tensors(spec):
        stem, kind = tensor.name.rsplit(".", 1)
        if stem == "lm_head":
            head = next((name for name in (f"lm_head.{kind}", f"language_model.lm_head.{kind}") if name in stored), f"lm_head.{kind}")
            found += _stacked(spec, tensor, (head,))
            continue
        part, where = stem, ""
        if tensor.layer >= 0:
            part, where = stem.split(".", 2)[2], f"{names['layers']}.{tensor.layer}."
        theirs = names[part]
        if spec.family == "falcon" and tensor.layer >= 0 and spec.layers[tensor.layer].arrangement == "parallel2" and part.endswith("_norm"):
            theirs = "ln_attn" if part == "attn_norm" else "ln_mlp"
        found += _stacked(spec, tensor, [f"{prefix}{where}{name}.{kind}" for name in ((theirs,) if isinstance(theirs, str) else theirs)])
    return tuple(found)


def gguf_pieces(spec: ModelSpec, architecture: str) -> tuple[Piece, ...]:
    """The pieces of a GGUF file of this `general.architecture`."""
    parts = gguf_tensor_parts(spec, architecture)
    return tuple(piece for tensor in model_tensors(spec) for piece in _stacked(spec, tensor, parts[tensor.name], gguf=True))


def _stacked(spec: ModelSpec, tensor: TensorSpec, sources: Collection[str], *, gguf: bool = False) -> Iterator[Piece]:
    """`sources` one after the other by rows, in the shares that the layer's spec gives them."""
    rows = tensor.shape[0]
    columns = tensor.shape[1] if len(tensor.shape) > 1 else 0
    layer = spec.layers[tensor.layer] if tensor.layer >= 0 else None
    is_qkv = layer is not None and ".attn.qkv." in tensor.name
    shares = [rows]
    if len(sources) > 1:
        assert layer is not None, f"{tensor.name} is stacked outside of the layers"
        if is_qkv and isinstance(layer.mixer, Attention):
            shares = [layer.mixer.N * layer.mixer.H, layer.mixer.K * layer.mixer.H, layer.mixer.K * layer.mixer.Hv]
        elif isinstance(layer.ffn, DenseFFN):
            shares = [layer.ffn.F, layer.ffn.F]
    order, heads = ("stacked", (0, 0, 0)) if gguf or not is_qkv else _qkv_order(spec, tensor.layer)
    start = 0
    for source, share in zip(sources, shares, strict=True):
        yield Piece(
            source=source,
            target=tensor.name,
            row_start=start,
            num_rows=share,
            num_columns=columns,
            order=order,
            heads=heads,
            transposed=not gguf and spec.family == "gpt2" and columns > 0 and tensor.role in ("qkv", "attn_out", "gate_up", "down"),
            added=1.0 if spec.norm_plus_one and tensor.role == "norm" and tensor.name.endswith(".weight") else 0.0,
        )
        start += share


def _qkv_order(spec: ModelSpec, layer: int) -> tuple[Order, tuple[int, int, int]]:
    """Falcon keeps each KV head's queries beside it, and so does GPT-BigCode without multi-query; with one KV head both are simply stacked."""
    mixer = spec.layers[layer].mixer
    if spec.family not in ("falcon", "gpt_bigcode") or not isinstance(mixer, Attention) or mixer.K == 1:
        return "stacked", (0, 0, 0)
    return "by_kv_head", (mixer.G, mixer.K, mixer.H)


def is_harmless(name: str, spec: ModelSpec) -> bool:
    """Whether a stored tensor that no piece names may be left out: recomputed everywhere, the other half of a tied pair, or counted as an extra."""
    if HARMLESS.fullmatch(name) or name in ROPE_TENSORS:
        return True
    if spec.tied and name in ("lm_head.weight", "language_model.lm_head.weight", "output.weight"):
        return True
    return bool(spec.extra_parameters and EYES.fullmatch(name))
