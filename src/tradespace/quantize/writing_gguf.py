"""Quantized tensors as a GGUF file. Metadata are the source's own, or made for a Hugging Face folder. The same interface as `writing.Checkpoint`.

Tensors wait in safetensors shards under their GGUF names, so that a killed run goes on; at the end they are copied into one file, a MiB at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tradespace.errors import InputError, UnsupportedError
from tradespace.formats import DTYPES, Codes
from tradespace.loading.gguf import GGUFFile, GGUFTensor
from tradespace.loading.gguf_export import DTYPES as GGML_DTYPES
from tradespace.loading.gguf_export import FILE_TYPES, TYPES, made_metadata
from tradespace.loading.gguf_metadata import NEVER_UNTIED, outline
from tradespace.loading.gguf_writer import TensorToWrite, write_gguf
from tradespace.loading.names import Piece, gguf_pieces
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.safetensors import SafetensorsTensor, read_safetensors_header
from tradespace.loading.weights import Source
from tradespace.quantize.shards import COPY_BYTES
from tradespace.quantize.source import halves_order
from tradespace.spec.formats import find_format
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.spec.weights import WeightPlan

QUANTIZED = tuple(name for name in TYPES if name not in DTYPES)


class GGUFCheckpoint:
    """How the tensors of one GGUF file are called and stored."""

    dtype = torch.float32  # of norms and biases

    def __init__(self, files: ModelFiles, source: Source, spec: ModelSpec, stored_spec: ModelSpec, plan: WeightPlan):
        """`spec` is what is written (rotary pairs in halves, perhaps untied), `stored_spec` what `source` holds.

        Raises InputError for a format that GGUF does not have, UnsupportedError for a model or a tokenizer that it cannot say.
        """
        for name in plan.names:
            if find_format(name).name not in TYPES:
                raise InputError(f"--to gguf has no {name}. It has {', '.join(QUANTIZED)}; other formats go --to compressed-tensors")
        self.spec = spec
        self.factors: dict[str, tuple[float, ...]] = {}
        if isinstance(source, GGUFFile):
            architecture = source.metadata["general.architecture"]
            if spec.tied != stored_spec.tied and architecture in NEVER_UNTIED:
                raise UnsupportedError(f"{spec.name}: a rotated model has a head of its own, for which llama.cpp's {architecture} has no tensor")
            self.stored_spec = replace(stored_spec, tied=spec.tied)
            self.metadata, self.types = dict(source.metadata), dict(source.metadata_types)
        else:
            made = outline(spec)
            architecture, self.stored_spec, self.factors = made.architecture, made.stored_spec, dict(made.factors)
            self.metadata, self.types = made_metadata(made, files)
        self.pieces: dict[str, list[Piece]] = {}
        for piece in gguf_pieces(self.stored_spec, architecture):
            self.pieces.setdefault(piece.target, []).append(piece)

    @property
    def norm_offset(self) -> float:
        return 0.0

    def dense(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """A norm or bias, in fp32; a matrix in `dtype`."""
        rows = self._stored_order(name, torch.arange(len(values)))
        values = values.to(self.dtype if dtype is None or values.ndim < 2 else dtype)
        return {piece.source: values[rows[piece.row_start : piece.row_start + piece.num_rows]] for piece in self.pieces[name]}

    def quantized(self, name: str, fmt: str, codes: Codes) -> dict[str, Tensor]:
        """A matrix as its blocks' bytes."""
        return self.dense(name, codes.codes_RC, DTYPES.get(fmt, torch.uint8))

    def quantized_chunks(self, name: str, fmt: str, chunks: Iterator[Codes]) -> tuple[Iterator[dict[str, Tensor]], dict[str, Tensor]]:
        """The same for a matrix that comes in runs of rows."""
        (piece,) = self.pieces[name]
        return ({piece.source: codes.codes_RC} for codes in chunks), {}

    def _stored_order(self, name: str, rows_R: Tensor) -> Tensor:
        """Which of our rows is each stored row: query and key rows go back to pairs (2i, 2i + 1)."""
        if ".attn.qkv." not in name:
            return rows_R
        mixer = self.stored_spec.layers[int(name.split(".")[1])].mixer
        assert isinstance(mixer, Attention)
        order = halves_order(mixer)
        if order is not None:
            rows_R[order] = torch.arange(len(order))
        return rows_R

    def finish(self, folder: Path, plan: WeightPlan, weight_map: Mapping[str, str], total_bytes: int, files: ModelFiles, source: Source) -> Path:
        """Writes model.gguf beside the shards, and returns its path."""
        types: dict[str, str] = {}
        for tensor in model_tensors(self.spec):
            kind = "F32" if len(tensor.shape) < 2 else TYPES[plan.format_of(tensor).name]
            types |= {piece.source: kind for piece in self.pieces[tensor.name]}
        headers = {name: read_safetensors_header(folder / name) for name in set(weight_map.values())}
        # a GGUF source's own order, and what it has besides: rotary factors, as they are
        first = tuple(source.tensors) if isinstance(source, GGUFFile) else ()
        listed: list[TensorToWrite] = []
        for name in (*first, *(name for name in types if name not in first)):
            if name in weight_map:
                entry = headers[weight_map[name]].tensors[name]
                listed.append((name, entry.shape if types[name] in GGML_DTYPES else self._shape(name), types[name], _copier(entry)))
            else:
                assert isinstance(source, GGUFFile), f"{name} was never written"
                stored = source.tensors[name]
                listed.append((name, stored.shape, stored.type_name, _copier(stored)))
        for name, values in self.factors.items():
            listed.append((name, (len(values),), "F32", lambda values=values: struct.pack(f"<{len(values)}f", *values)))
        told = {"general.file_type": FILE_TYPES[TYPES[find_format(plan.default).name]], "general.quantization_version": 2}
        metadata = {key: value for key, value in self.metadata.items() if key != "general.quantized_by"} | told
        write_gguf(folder / "model.gguf", metadata, listed, types={**self.types, **dict.fromkeys(told, "uint32")})
        return folder / "model.gguf"

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(piece for pieces in self.pieces.values() for piece in pieces if piece.source == name).source_shape


def _copier(stored: SafetensorsTensor | GGUFTensor) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        left = stored.nbytes
        with open(stored.path, "rb") as file:
            file.seek(stored.offset_bytes)
            while left:
                piece = file.read(min(left, COPY_BYTES))
                assert piece, f"{stored.path} has shrunk"
                left -= len(piece)
                yield piece

    return pieces
