"""transformers as the oracle: a random model of a family, saved to disk, and ours loaded from there; plus a small driver of ragged steps with a cache."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from model.family_configs import FAMILIES
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import KVCache
from tradespace.loading.safetensors import read_sharded
from tradespace.loading.weights import load_weights
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.kv import KVPlan
from tradespace.spec.model import ModelSpec
from tradespace.spec.weights import WeightPlan

STAGING_BYTES = 4096  # so small that every matrix takes several chunks
FP32 = WeightPlan(default="fp32")


@dataclass(frozen=True)
class Pair:
    """The oracle and the folder that it was saved to."""

    oracle: transformers.PreTrainedModel
    folder: Path

    @property
    def spec(self) -> ModelSpec:
        return model_spec_from_config(json.loads((self.folder / "config.json").read_text()), "tiny")

    def ours(self, *, max_context: int, plan: WeightPlan = FP32, attention: str = "sdpa", linear: str = "torch") -> Transformer:
        model = Transformer(self.spec, plan, attention=attention, linear=linear, max_context=max_context)
        load_weights(model, read_sharded(self.folder), self.spec, fill=fill_rtn, staging_bytes=STAGING_BYTES)
        return model

    @torch.inference_mode()
    def logits(self, tokens_T: Tensor) -> Tensor:
        return self.oracle(tokens_T[None]).logits[0].float()


def make_pair(family: str, seed: int, folder: Path) -> Pair:
    """A random model: biases and norms drawn too, and weights large enough for attention to be sharp and soft caps to bite."""
    torch.manual_seed(seed)
    config = FAMILIES[family](random.Random(f"{family} {seed}"))
    config._attn_implementation = "eager"
    oracle = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name or "ln_" in name:
                parameter.mul_(0.5)
                if name.endswith("weight") and "gemma" not in family:
                    parameter.add_(1.0)
    oracle.save_pretrained(folder)
    return Pair(oracle, folder)


def packed_logits(model: Transformer, sequences: list[Tensor]) -> list[Tensor]:
    """Logits of all positions of whole sequences in one ragged step without a cache."""
    batch = StepBatch.packed([len(tokens_T) for tokens_T in sequences])
    with torch.inference_mode():
        logits_TV = model.logits(model(torch.cat(sequences), positions_of(batch.spans), batch))
    return list(logits_TV.split([len(tokens_T) for tokens_T in sequences]))


class Stepper:
    """Sequences in a cache, each with blocks of its own, advanced by ragged steps of any number of tokens each."""

    def __init__(self, model: Transformer, count: int, layout: str, *, block_size: int = 4):
        self.model, self.lengths = model, [0] * count
        context = model.max_context
        plan = KVPlan(layout=layout, block_size=block_size if layout == "paged" else 16, store="fp32" if model.dtype == torch.float32 else "bf16")
        per_sequence = -(-context // block_size) if layout == "paged" else 1
        self.block_size = block_size if layout == "paged" else context
        self.cache = KVCache(model.spec, plan, num_blocks=count * per_sequence, block_size=self.block_size, dtype=model.dtype)
        # blocks are dealt out like cards, so that no sequence's lie side by side
        self.blocks = [tuple(range(i, count * per_sequence, count)) for i in range(count)]

    @torch.inference_mode()
    def step(self, chunks: dict[int, Tensor]) -> dict[int, Tensor]:
        """Feeds each named sequence its next tokens; returns the logits of all of them."""
        spans, start = [], 0
        for sequence, tokens_T in chunks.items():
            self.lengths[sequence] += len(tokens_T)
            used = -(-self.lengths[sequence] // self.block_size)
            spans.append(Span(start, len(tokens_T), self.lengths[sequence], self.blocks[sequence][:used]))
            start += len(tokens_T)
        batch = StepBatch.from_spans(spans, block_size=self.block_size)
        hidden_TD = self.model(torch.cat(list(chunks.values())), positions_of(spans), batch, self.cache)
        parts = self.model.logits(hidden_TD).split([len(tokens_T) for tokens_T in chunks.values()])
        return dict(zip(chunks, parts, strict=True))
