"""Free-standing closed formulas of memory, each by the name that the documentation uses. Decimal prefixes belong to the reader; these are bytes."""

from __future__ import annotations

from tradespace.spec.attention import score_matrix_bytes
from tradespace.spec.formats import ELEMENT_BYTES
from tradespace.spec.kv import token_bytes
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import num_parameters


def kv_cache_bytes(model: ModelSpec, tokens: int, batch: int = 1, store: str = "fp16") -> int:
    """Bytes of the keys and values of `batch` sequences of `tokens` each: Σ layers K·(H + Hv) · tokens · batch · element."""
    return batch * tokens * token_bytes(model, store)


def attention_matrix_bytes(num_queries: int, num_keys: int, *, heads: int = 1, batch: int = 1, element_bytes: int = 4) -> int:
    """Bytes of the scores of attention if they are written out: one matrix a head and sequence.

    >>> attention_matrix_bytes(32768, 32768)
    4294967296
    """
    return heads * batch * score_matrix_bytes(num_queries, num_keys, element_bytes)


def activation_bytes_per_token(D: int, element_bytes: int) -> int:
    """Bytes of one token in the residual stream."""
    return D * element_bytes


def training_bytes(parameters: int, *, weights: str = "bf16", gradients: str = "bf16", master_copy: bool = True, moments: str = "fp32") -> int:
    """Bytes of weights, gradients and AdamW's two moments (arXiv:1711.05101), with an fp32 master copy where weights are 16-bit. No activations.

    >>> training_bytes(1_000_000)  # 2 + 2 + 4 + 8 bytes a parameter
    16000000
    """
    master = 4 if master_copy and weights != "fp32" else 0
    return parameters * (ELEMENT_BYTES[weights] + ELEMENT_BYTES[gradients] + master + 2 * ELEMENT_BYTES[moments])


def model_training_bytes(model: ModelSpec, *, weights: str = "bf16") -> int:
    """`training_bytes` of all of a model's parameters."""
    return training_bytes(num_parameters(model), weights=weights)
