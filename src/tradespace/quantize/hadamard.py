"""A model turned so that no channel stands out, exactly: the residual stream by a random Hadamard matrix Q, each value head by one of its own (QuaRot,
arXiv:2404.00456). Nothing is left to do at run time; the layers' outputs are the same numbers in another basis.

An RMS norm without weights commutes with Q. So first every norm's weight moves into the linears that it feeds, then
    embedding E Q · what reads the stream W Q · what writes it Qᵀ W · the head W diag(g) Q, which a tied embedding cannot be: it is untied.
A Hadamard matrix of order 2^k·m has m = 1, q + 1 (q ≡ 3 mod 4 a prime) or 2(q + 1) (q ≡ 1 mod 4), Paley's; a width without one gets blocks of 2^k mixed by a
random orthogonal matrix of the odd part. D² numbers, D²·rows operations a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats.hadamard import hadamard as sylvester
from tradespace.formats.hadamard import signs
from tradespace.quantize.source import Weights
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, ModelSpec


def check_rotatable(spec: ModelSpec) -> None:
    """Raises UnsupportedError for a model whose norms do not commute with a rotation, and says which."""
    why = None
    if spec.norm != "rms" or spec.norm_bias:
        why = "its layer norms subtract the mean, which a rotation mixes up"
    elif any(layer.arrangement in ("sandwich", "post") for layer in spec.layers):
        why = "its layers weigh their outputs by a norm before adding them to the residual stream, and those weights cannot be moved into a linear"
    elif spec.learned_positions or spec.embed_norm or not spec.final_norm:
        why = "positions or a norm at the embedding stand between it and the layers" if spec.final_norm else "its head reads the stream without a norm"
    elif any(not isinstance(layer.mixer, Attention | None) or not isinstance(layer.ffn, DenseFFN | None) for layer in spec.layers):
        why = "it has layers other than attention and dense feed-forwards"
    if why is not None:
        raise UnsupportedError(f"{spec.name} cannot be rotated: {why}. Use --method gptq or awq, or --format e8, which rotates as it runs")


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix (±1, order × order) by quadratic residues of a prime, or None."""
    if order == 1:
        return torch.ones(1, 1)
    for q, twice in ((order - 1, False), (order // 2 - 1, True)):
        if order % 4 or not _is_prime(q) or q % 4 != (1 if twice else 3):
            continue
        residues = {x * x % q for x in range(1, q)}
        chi = torch.tensor([0.0] + [1.0 if x in residues else -1.0 for x in range(1, q)])
        ids = torch.arange(q)
        jacobsthal = chi[(ids[:, None] - ids) % q]
        core = torch.zeros(q + 1, q + 1)
        core[0, 1:], core[1:, 1:] = 1, jacobsthal
        core[1:, 0] = 1 if twice else -1
        if not twice:
            return core + torch.eye(q + 1)
        one, diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(core, one) + torch.kron(torch.eye(q + 1), diagonal)
    return None


def random_rotation(width: int, seed: int) -> Tensor:
    """Q, orthogonal (width, width) fp32: random signs, then a Hadamard matrix."""
    power = width & -width
    block = power
    while block >= 1:
        base = _paley(width // block)
        if base is not None:
            matrix = torch.kron(sylvester(block), base / len(base) ** 0.5)
            return matrix * signs(width, seed)[:, None]
        block //= 2
    draw = torch.Generator().manual_seed(seed)
    odd, _ = torch.linalg.qr(torch.randn(width // power, width // power, generator=draw, dtype=torch.float64))
    return torch.kron(sylvester(power), odd.float().contiguous()) * signs(width, seed)[:, None]


class RotatedWeights:
    """`Weights` of the turned model, read through those of the model as it is stored. Its spec is untied."""

    def __init__(self, weights: Weights, seed: int):
        check_rotatable(weights.spec)
        self.inner, self.stored_spec, self.spec = weights, weights.stored_spec, replace(weights.spec, tied=False)
        self.turn_DD = random_rotation(self.spec.D, seed)
        heads = {layer.mixer.Hv for layer in self.spec.layers if isinstance(layer.mixer, Attention)}
        self.head_turns = {size: random_rotation(size, seed + 1) for size in heads}

    def _norm_of(self, layer: int, part: str) -> Tensor:
        arrangement = self.spec.layers[layer].arrangement
        norm = "attn_norm" if part == "qkv" or arrangement == "parallel" else "ffn_norm"
        return self.inner.read(f"layers.{layer}.{norm}.weight")

    def read(self, name: str) -> Tensor:
        """As `Weights.read`, folded and turned."""
        if not name.startswith("layers."):
            found = self.inner.read(name)
            return torch.ones_like(found) if name == "final_norm.weight" else found
        _, number, rest = name.split(".", 2)
        found, layer = self.inner.read(name), int(number)
        if rest in ("attn_norm.weight", "ffn_norm.weight"):
            return torch.ones_like(found)
        if rest in ("attn.qkv.weight", "ffn.gate_up.weight", "ffn.up.weight"):
            found = found.mul_(self._norm_of(layer, rest.split(".")[1])) @ self.turn_DD
            return self._turn_values(layer, found) if rest == "attn.qkv.weight" else found
        if rest == "attn.qkv.bias":
            return self._turn_values(layer, found[:, None])[:, 0]
        if rest == "attn.out.weight":
            mixer = self._attention(layer)
            found = (found.view(-1, mixer.N, mixer.Hv) @ self.head_turns[mixer.Hv]).flatten(1)
            return self.turn_DD.T @ found
        if rest in ("attn.out.bias", "ffn.down.weight", "ffn.down.bias"):
            return self.turn_DD.T @ found
        return found

    def _attention(self, layer: int) -> Attention:
        mixer = self.spec.layers[layer].mixer
        assert isinstance(mixer, Attention)
        return mixer

    def _turn_values(self, layer: int, rows_RX: Tensor) -> Tensor:
        mixer = self._attention(layer)
        first = len(rows_RX) - mixer.K * mixer.Hv
        values_KHX = rows_RX[first:].view(mixer.K, mixer.Hv, -1)
        rows_RX[first:] = (self.head_turns[mixer.Hv].T @ values_KHX).flatten(0, 1)
        return rows_RX

    def row_chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """As `Weights.row_chunks`; the head of a tied model is made of its embedding."""
        if name == "embed.weight":
            for row, values_RC in self.inner.row_chunks(name):
                yield row, values_RC @ self.turn_DD
            return
        assert name == "lm_head.weight", f"{name} is read whole"
        gain_D = self.inner.read("final_norm.weight")
        for row, values_RC in self.inner.row_chunks("embed.weight" if self.inner.spec.tied else name):
            yield row, (values_RC * gain_D) @ self.turn_DD
