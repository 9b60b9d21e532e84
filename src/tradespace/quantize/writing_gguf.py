"""Quantized tensors as a GGUF file: the source's own metadata and tensor names, new blocks. The same interface as `writing.Checkpoint`.

Tensors wait in safetensors shards under their GGUF names, so that a killed run goes on; at the end they are copied into one file, a MiB at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tradespace.errors import InputError, UnsupportedError
from tradespace.formats import DTYPES, Codes
from tradespace.loading.ggml_types import GGML_TYPES
from tradespace.loading.gguf import GGUFFile, write_gguf
from tradespace.loading.names import Piece, gguf_pieces
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.safetensors import read_safetensors_header
from tradespace.loading.weights import Source
from tradespace.quantize.shards import COPY_BYTES
from tradespace.quantize.source import halves_order
from tradespace.spec.formats import find_format
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.spec.weights import WeightPlan

_DENSE_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
# general.file_type, by which programs name what most tensors are
_FILE_TYPES = {"fp32": 0, "fp16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k": 15, "q5_k": 17, "q6_k": 18, "bf16": 32}


def ggml_type(fmt: str) -> str | None:
    """GGML's name of one of our formats; None where it has none."""
    name = _DENSE_TYPES.get(fmt, fmt.upper())
    return name if name in GGML_TYPES else None


class GGUFCheckpoint:
    """How the tensors of one GGUF file are called and stored."""

    dtype = torch.float32  # of norms and biases

    def __init__(self, source: Source, spec: ModelSpec, stored_spec: ModelSpec, plan: WeightPlan):
        """Raises UnsupportedError for a source that is no GGUF file, InputError for a format that GGUF does not have."""
        if not isinstance(source, GGUFFile):
            raise UnsupportedError(f"{spec.name}: --to gguf takes a GGUF file, whose metadata and tokenizer it keeps. Use --to compressed-tensors for a folder")
        if spec.tied != stored_spec.tied:
            raise UnsupportedError(f"{spec.name}: a rotated model has a head of its own, which its GGUF metadata do not know. Use --to compressed-tensors")
        for name in plan.names:
            if ggml_type(name) is None:
                known = ", ".join(key for key in _FILE_TYPES if key not in DTYPES)
                raise InputError(f"--to gguf has no {name}. It has {known}; other formats go --to compressed-tensors")
        self.spec, self.stored_spec = spec, stored_spec
        self.pieces: dict[str, list[Piece]] = {}
        for piece in gguf_pieces(stored_spec, source.metadata["general.architecture"]):
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
        assert isinstance(source, GGUFFile)
        types: dict[str, str] = {}
        for tensor in model_tensors(self.spec):
            kind = "F32" if len(tensor.shape) < 2 else ggml_type(plan.format_of(tensor).name)
            assert kind is not None, f"{tensor.name} in {plan.format_of(tensor).name} was refused before"
            types |= {piece.source: kind for piece in self.pieces[tensor.name]}
        headers = {name: read_safetensors_header(folder / name) for name in set(weight_map.values())}
        listed = []
        for name, stored in source.tensors.items():
            if name in weight_map:
                entry = headers[weight_map[name]].tensors[name]
                listed.append((name, stored.shape, types[name], _copier(entry.path, entry.offset_bytes, entry.nbytes)))
            else:  # rotary factors: as they are
                listed.append((name, stored.shape, stored.type_name, _copier(stored.path, stored.offset_bytes, stored.nbytes)))
        metadata = dict(source.metadata) | {"general.file_type": _FILE_TYPES[find_format(plan.default).name]}
        metadata.pop("general.quantized_by", None)
        write_gguf(folder / "model.gguf", metadata, listed, types={**source.metadata_types, "general.file_type": "uint32"})
        return folder / "model.gguf"


def _copier(path: Path, offset_bytes: int, nbytes: int) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        left = nbytes
        with open(path, "rb") as file:
            file.seek(offset_bytes)
            while left:
                piece = file.read(min(left, COPY_BYTES))
                assert piece, f"{path} has shrunk"
                left -= len(piece)
                yield piece

    return pieces
