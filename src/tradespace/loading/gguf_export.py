"""A whole model as a GGUF file that llama.cpp opens: metadata, tokenizer, and tensors under its names, in its order of rows, a few rows at a time.

From a GGUF source all metadata are copied, from a Hugging Face folder they are made (`loading/gguf_metadata`, `loading/gguf_vocabulary`). llama.cpp rotates
neighbouring pairs in Llama and SmolLM3: query and key rows whose pairs lie half a head apart are put beside each other, which no row's codes notice.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.loading.ggml_types import GGML_TYPES
from tradespace.loading.gguf import GGUFFile, read_gguf, read_raw
from tradespace.loading.gguf_metadata import Outline, outline
from tradespace.loading.gguf_vocabulary import vocabulary_metadata
from tradespace.loading.gguf_writer import TensorToWrite, write_gguf
from tradespace.loading.names import Piece, gguf_pieces
from tradespace.loading.resolve import ModelFiles
from tradespace.spec.formats import find_format, refusal
from tradespace.spec.gguf_config import ARCHITECTURES, ROPE_TENSORS
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import TensorSpec, model_tensors
from tradespace.units import MiB

CHUNK_BYTES = 4 * MiB
# our format → GGML type; and GGUF's general.file_type for a file that is mostly of it
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"} | {name: name.upper() for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Rows = Callable[[str, int, int], Codes | Tensor]


def write_model(path: str | os.PathLike[str], spec: ModelSpec, files: ModelFiles, *, format_of: Callable[[TensorSpec], str], rows: Rows) -> None:
    """Writes the model of `files` (where metadata and tokenizer come from) with weights of our own, whose rows and pairs lie as `spec` says.

    format_of  of a matrix: fp32, fp16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k or q6_k. Vectors are written as F32
    rows       (canonical tensor name, start, stop) → codes of that format, or its values as floats; a norm or a bias as values: what multiplies, what is added.
               Called in runs of at most CHUNK_BYTES or of one head, each row once

    Raises UnsupportedError for a format, a width, a model or a tokenizer that GGUF cannot hold. The file appears whole or not at all.
    """
    source = read_gguf(files.weights[0]) if files.kind == "gguf" else None
    made = outline(spec) if source is None else None
    if source is not None:
        metadata, types = dict(source.metadata), dict(source.metadata_types)
    else:
        assert made is not None
        metadata, types = made_metadata(made, files)
    architecture = metadata.get("general.architecture", "")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(f"{spec.name}: GGUF architecture {architecture!r} is not written. Written: {', '.join(ARCHITECTURES)}")
    specs = {tensor.name: tensor for tensor in model_tensors(spec)}
    outgoing = [_outgoing(spec, architecture, specs[piece.target], piece, format_of) for piece in gguf_pieces(spec, architecture)]
    most = max(outgoing, key=lambda one: (one.type_name != "F32", prod(one.shape)))
    metadata |= {"general.file_type": FILE_TYPES[most.type_name], "general.quantization_version": 2}
    types |= {"general.file_type": "uint32", "general.quantization_version": "uint32"}
    tensors: list[TensorToWrite] = [(one.piece.source, one.shape, one.type_name, one.producer(rows)) for one in outgoing]
    write_gguf(path, metadata, [*tensors, *_rope_tensors(source, made)], types=types)


@dataclass(frozen=True, kw_only=True)
class _Outgoing:
    """One tensor of the file: which rows of which of ours, as what. `head` rows are reordered among themselves; 0: none are."""

    piece: Piece
    type_name: str
    shape: tuple[int, ...]
    head: int

    def producer(self, rows: Rows) -> Callable[[], Iterator[memoryview]]:
        return lambda: self._bytes(rows)

    def _bytes(self, rows: Rows) -> Iterator[memoryview]:
        _, block, block_bytes = GGML_TYPES[self.type_name]
        row_bytes = max(4, self.piece.num_columns) * max(4, block_bytes // block)
        step = max(1, CHUNK_BYTES // row_bytes)
        if self.head:
            step = max(self.head, step // self.head * self.head)
        for start in range(0, self.piece.num_rows, step):
            stop = min(start + step, self.piece.num_rows)
            found = rows(self.piece.target, self.piece.row_start + start, self.piece.row_start + stop)
            stored = found.codes_RC if isinstance(found, Codes) else found
            if self.head:
                stored = stored[_paired(stop - start, self.head)]
            if self.type_name in DTYPES:
                stored = stored.to(DTYPES[self.type_name])
            elif stored.dtype != torch.uint8:
                raise UnsupportedError(f"{self.piece.source}: {self.type_name} is written from codes in that format; these are {stored.dtype}")
            yield stored.contiguous().flatten().view(torch.uint8).numpy().data


def _paired(count: int, head: int) -> Tensor:
    """For rows of whole heads: which of ours comes at each place when pair i moves from rows (i, i + head/2) to (2i, 2i + 1).

    >>> _paired(8, 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return torch.arange(count).view(-1, 2, head // 2).transpose(1, 2).flatten()


def _outgoing(spec: ModelSpec, architecture: str, tensor: TensorSpec, piece: Piece, format_of: Callable[[TensorSpec], str]) -> _Outgoing:
    shape = (piece.num_rows,) if piece.is_vector else (piece.num_rows, piece.num_columns)
    type_name = "F32"
    if not piece.is_vector and tensor.role != "positions":
        name = find_format(format_of(tensor)).name
        if name not in TYPES:
            raise UnsupportedError(f"{piece.source}: GGUF has no type for {name}. It has {', '.join(TYPES)}")
        if reason := refusal(find_format(name), piece.num_columns):
            raise UnsupportedError(f"{piece.source}: {reason}")
        type_name = TYPES[name]
    return _Outgoing(piece=piece, type_name=type_name, shape=shape, head=_head_to_pair(spec, architecture, tensor, piece))


def _head_to_pair(spec: ModelSpec, architecture: str, tensor: TensorSpec, piece: Piece) -> int:
    """The head size where these are query or key rows, in halves with us and in pairs there; else 0."""
    if not ARCHITECTURES[architecture].interleaved or not piece.source.rsplit(".", 1)[0].endswith((".attn_q", ".attn_k")):
        return 0
    ropes = {layer.mixer.rope for layer in spec.layers if isinstance(layer.mixer, Attention) and layer.mixer.rope is not None}
    mixer = spec.layers[tensor.layer].mixer
    assert isinstance(mixer, Attention), f"{tensor.name} belongs to no attention"
    if any(rope.interleaved for rope in ropes):
        return 0
    if any(rope.dims != mixer.H for rope in ropes):
        raise UnsupportedError(f"{spec.name}: heads of {mixer.H} that rotate only in part have no form in GGUF's {architecture}")
    return mixer.H


def made_metadata(made: Outline, files: ModelFiles) -> tuple[dict[str, Any], dict[str, str]]:
    """(metadata, their GGUF types) of a Hugging Face folder: the model's and its tokenizer's. Raises as `vocabulary_metadata` does."""
    vocabulary, types = vocabulary_metadata(files, made.stored_spec.V)
    return dict(made.metadata) | vocabulary, types


def _rope_tensors(source: GGUFFile | None, found: Outline | None) -> list[TensorToWrite]:
    """Tensors of rotary factors: the source's own, or those worked out."""
    if source is not None:
        kept = [source.tensors[name] for name in ROPE_TENSORS if name in source.tensors]
        return [(tensor.name, tensor.shape, tensor.type_name, lambda tensor=tensor: read_raw(tensor)) for tensor in kept]
    assert found is not None
    return [(name, (len(values),), "F32", lambda values=values: struct.pack(f"<{len(values)}f", *values)) for name, values in found.factors.items()]
