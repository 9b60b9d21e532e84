"""Six snippets that the documents print (claim 45), each rewritten with its mistake, beside one that is right, and a test that tells them apart.

The code is ours: what is taken over is the idea of each snippet and what is wrong with it.

    attention   scores scaled by the model's width instead of the head's, and no mask: a token sees its future
    mqa cache   room for the model's width per token, as if every head had keys of its own: nothing is saved
    int8        codes made by multiplying with a scale that does not come from the values: they are clipped, or all zero
    lora        factors in an order whose product has not the weight's shape
    mixture     experts' outputs added up without the router's weights
    pages       a token looked for among blocks instead of in the block that its position names
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def attention_printed(q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q_TD, k_TD, v_TD))
    weights = torch.softmax(q @ k.transpose(1, 2) / q_TD.shape[1] ** 0.5, dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def attention(q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, heads: int) -> Tensor:
    """Causal attention: scaled by the head's width, the future hidden."""
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q_TD, k_TD, v_TD))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return (torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v).transpose(0, 1).flatten(1)


def mqa_cache_printed(tokens: int, width: int, heads: int) -> int:
    return 2 * tokens * width * 2


def mqa_cache(tokens: int, width: int, heads: int) -> int:
    """Bytes of a multi-query cache in 16 bits: one head's keys and values a token."""
    return 2 * tokens * (width // heads) * 2


def int8_printed(w: Tensor, scale: float = 127.0) -> tuple[Tensor, float]:
    return (w * scale).to(torch.int8), scale


def int8(w: Tensor) -> tuple[Tensor, float]:
    """Codes and scale: the largest value becomes 127, and what lies beyond cannot be."""
    scale = 127.0 / max(float(w.abs().max()), 1e-30)
    return (w * scale).round().clamp(-127, 127).to(torch.int8), scale


def lora_printed(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    rows, columns = w_OI.shape
    return torch.randn(rows, rank), torch.zeros(rank, columns)


def lora_apply_printed(x_TI: Tensor, w_OI: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x_TI @ w_OI.T + x_TI @ a @ b


def lora(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) of shapes (rank, in) and (out, rank); B is zero, so that the adapted layer starts as the layer."""
    rows, columns = w_OI.shape
    return torch.randn(rank, columns) / columns**0.5, torch.zeros(rows, rank)


def lora_apply(x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    return x_TI @ w_OI.T + x_TI @ a_RI.T @ b_OR.T


def mixture_printed(x_D: Tensor, router_ED: Tensor, experts: list[Tensor], top_k: int) -> Tensor:
    chosen = (router_ED @ x_D).topk(top_k).indices
    return torch.stack([experts[int(e)] @ x_D for e in chosen]).sum(0)


def mixture(x_TD: Tensor, router_ED: Tensor, experts: list[Tensor], top_k: int) -> Tensor:
    """Each token's best experts, weighted by a softmax over the chosen; any number of tokens."""
    scores_TK, chosen_TK = (x_TD @ router_ED.T).topk(top_k, dim=-1)
    weights_TK = torch.softmax(scores_TK, dim=-1)
    out = torch.zeros_like(x_TD)
    for e, w_DD in enumerate(experts):
        rows, places = (chosen_TK == e).nonzero(as_tuple=True)
        out.index_add_(0, rows, weights_TK[rows, places, None] * (x_TD[rows] @ w_DD.T))
    return out


def page_printed(table: list[int], position: int, block: int) -> int | None:
    return position % block if position in table else None


def page(table: list[int], position: int, block: int) -> tuple[int, int]:
    """(block, offset) of a position in a sequence with this block table."""
    return table[position // block], position % block


@dataclass(frozen=True)
class Snippet:
    """`printed_fails` and `fixed_fails`: None where the result is right, else what is wrong."""

    printed_fails: Callable[[], str | None]
    fixed_fails: Callable[[], str | None]


def _attention_case(attend: Callable[..., Tensor]) -> str | None:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((6, 16), generator=gen) for _ in range(3))
    changed = v.clone()
    changed[-1] += 1
    if not torch.equal(attend(q, k, v, 4)[:-1], attend(q, k, changed, 4)[:-1]):
        return "a token sees its future"
    shape = (1, 6, 4, 4)
    q_heads, k_heads, v_heads = (x.view(shape).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q_heads, k_heads, v_heads, is_causal=True).transpose(1, 2).reshape(6, 16)
    return None if torch.allclose(attend(q, k, v, 4), expected, atol=1e-5) else "scores have the wrong scale"


def _mqa_case(size: Callable[[int, int, int], int]) -> str | None:
    saved = 2 * 100 * 768 * 2 / size(100, 768, 12)
    return None if saved == 12 else f"12 heads share one, and the cache is {saved:g} times smaller instead of 12"


def _int8_case(quantize: Callable[[Tensor], tuple[Tensor, float]]) -> str | None:
    for largest in (0.01, 1.0, 300.0):
        w = torch.linspace(-largest, largest, 255)
        codes, scale = quantize(w)
        worst = float((codes.float() / scale - w).abs().max()) / largest
        if worst > 1 / 127:
            return f"weights up to {largest:g} come back {worst:.0%} wrong"
    return None


def _lora_case(make: Callable[..., tuple[Tensor, Tensor]], apply: Callable[..., Tensor]) -> str | None:
    w, x = torch.randn(24, 16), torch.randn(3, 16)
    a, b = make(w, 4)
    try:
        out = apply(x, w, a, b)
    except RuntimeError:
        return "factors of a weight that is not square cannot be multiplied"
    return None if torch.allclose(out, x @ w.T, atol=1e-5) else "the adapted layer does not start as the layer"


def _mixture_case(mix: Callable[..., Tensor]) -> str | None:
    gen = torch.Generator().manual_seed(0)
    x, router = torch.randn((5, 8), generator=gen), torch.randn((4, 8), generator=gen)
    experts = [torch.eye(8)] * 4  # every expert returns its input: so must their weighted mean
    try:
        out = mix(x, router, experts, 2)
    except (RuntimeError, ValueError, IndexError):
        one = mix(x[0], router, experts, 2)
        return "takes one token alone" + ("" if torch.allclose(one, x[0], atol=1e-5) else ", and adds experts up without the router's weights")
    return None if out.shape == x.shape and torch.allclose(out, x, atol=1e-5) else "experts are added up without the router's weights"


def _page_case(find: Callable[[list[int], int, int], object]) -> str | None:
    return None if find([7, 3, 9], 20, 16) == (3, 4) else "position 20 of blocks 7, 3, 9 lies in block 3, and is not found: blocks are searched for a position"


SNIPPETS: dict[str, Snippet] = {
    "attention": Snippet(lambda: _attention_case(attention_printed), lambda: _attention_case(attention)),
    "mqa cache": Snippet(lambda: _mqa_case(mqa_cache_printed), lambda: _mqa_case(mqa_cache)),
    "int8": Snippet(lambda: _int8_case(int8_printed), lambda: _int8_case(int8)),
    "lora": Snippet(lambda: _lora_case(lora_printed, lora_apply_printed), lambda: _lora_case(lora, lora_apply)),
    "mixture": Snippet(lambda: _mixture_case(mixture_printed), lambda: _mixture_case(mixture)),
    "pages": Snippet(lambda: _page_case(page_printed), lambda: _page_case(page)),
}


def fails(name: str) -> str | None:
    """What is wrong with a printed snippet; None: nothing."""
    return SNIPPETS[name].printed_fails()
