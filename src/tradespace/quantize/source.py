"""A model's tensors by their canonical names, one at a time and in fp32, out of a GGUF file or safetensors: nothing else of the model is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from tradespace.errors import InputError, UnsupportedError
from tradespace.loading.dequantize import iter_rows
from tradespace.loading.names import Piece
from tradespace.loading.rawfile import shown
from tradespace.loading.weights import Source, check_pieces
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.units import MiB

STAGING_BYTES = 4 * MiB


class Weights(Protocol):
    """What the quantizers read a model through: the stored tensors, or a folded form of them."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def stored_spec(self) -> ModelSpec:
        """The spec that the file states."""
        ...

    def read(self, name: str) -> Tensor:
        """A whole tensor, fp32, the caller's own."""
        ...

    def row_chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows fp32) of a large matrix, in order; a chunk is valid until the next one."""
        ...


def with_halves(spec: ModelSpec) -> ModelSpec:
    """The spec with rotary pairs (i, i + dims/2), as Hugging Face's checkpoints have them, where a GGUF file has (2i, 2i + 1)."""

    def halved(mixer: Attention) -> Attention:
        if mixer.rope is None or not mixer.rope.interleaved:
            return mixer
        if mixer.qk_norm == "full":
            raise UnsupportedError(f"{spec.name}: rotary pairs under a norm of the whole projection cannot be put in the order of Hugging Face's checkpoints")
        return replace(mixer, rope=replace(mixer.rope, interleaved=False))

    layers = tuple(replace(layer, mixer=halved(layer.mixer)) if isinstance(layer.mixer, Attention) else layer for layer in spec.layers)
    return replace(spec, layers=layers)


def halves_order(mixer: Attention) -> Tensor | None:
    """Which stored query or key row comes where, to have pairs (i, i + dims/2); None where they are so already."""
    if mixer.rope is None or not mixer.rope.interleaved:
        return None
    dims = mixer.rope.dims
    within = torch.cat([torch.arange(0, dims, 2), torch.arange(1, dims, 2), torch.arange(dims, mixer.H)])
    return (torch.arange(mixer.N + mixer.K)[:, None] * mixer.H + within).flatten()


class StoredWeights:
    """`Weights` as they lie on the disk, but for two things: norms are what multiplies (Gemma's 1 is added), and query and key rows are in the order that
    halves want (`with_halves`), so `spec` may differ from the file's in `Rope.interleaved`."""

    def __init__(self, source: Source, spec: ModelSpec, *, staging_bytes: int = STAGING_BYTES):
        self.source, self.stored_spec, self.staging_bytes = source, spec, staging_bytes
        self.spec = with_halves(spec)
        self.pieces: dict[str, list[Piece]] = {}
        for piece in check_pieces(source, spec):
            self.pieces.setdefault(piece.target, []).append(piece)

    def read(self, name: str) -> Tensor:
        """Raises InputError where the tensor holds NaN or infinity."""
        pieces = self.pieces[name]
        num_rows = sum(piece.num_rows for piece in pieces)
        columns = pieces[0].num_columns
        out_RC = torch.empty(num_rows, max(1, columns))
        for piece in pieces:
            self._read_piece(piece, out_RC)
        if ".attn.qkv." in name:
            out_RC = self._halved(int(name.split(".")[1]), out_RC)
        return out_RC if columns else out_RC[:, 0]

    def _halved(self, layer: int, rows_RC: Tensor) -> Tensor:
        """Query and key rows from pairs (2i, 2i + 1) to pairs (i, i + dims/2)."""
        mixer = self.stored_spec.layers[layer].mixer
        assert isinstance(mixer, Attention)
        order = halves_order(mixer)
        if order is not None:
            rows_RC[: len(order)] = rows_RC[order]
        return rows_RC

    def _read_piece(self, piece: Piece, out_RC: Tensor) -> None:
        for row, values_RC in self._finite_rows(piece):
            if piece.is_vector:
                values_RC = values_RC.T
            if piece.transposed:
                out_RC[piece.row_start : piece.row_start + piece.num_rows, row : row + len(values_RC)] = values_RC.T
                continue
            if piece.order == "stacked":
                target = out_RC[piece.row_start + row : piece.row_start + row + len(values_RC)]
                torch.add(values_RC, piece.added, out=target) if piece.added else target.copy_(values_RC)
            else:
                places = torch.tensor([piece.row_start + piece.target_row(stored) for stored in range(row, row + len(values_RC))])
                out_RC[places] = values_RC + piece.added

    def row_chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Of a matrix that is stored as one tensor, rows in order (embeddings and heads are). Raises InputError for NaN or infinity."""
        (piece,) = self.pieces[name]
        assert piece.order == "stacked" and not piece.transposed, f"{name} is not stored row by row"
        yield from self._finite_rows(piece)

    def _finite_rows(self, piece: Piece) -> Iterator[tuple[int, Tensor]]:
        for row, values_RC in iter_rows(self.source, piece.source, staging_bytes=self.staging_bytes):
            if not values_RC.isfinite().all():
                raise InputError(f"tensor {shown(piece.source)} holds NaN or infinity. The checkpoint is damaged, or training had diverged")
            yield row, values_RC
