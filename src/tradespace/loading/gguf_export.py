"""A whole model as a GGUF file that llama.cpp opens: metadata, tokenizer, and tensors under its names, in its order of rows, a few rows at a time.

From a GGUF source all metadata are copied. From a Hugging Face folder they are made for the architectures of Llama's kin; others are refused. llama.cpp
rotates neighbouring pairs in Llama and SmolLM3: query and key rows whose pairs lie half a head apart are put beside each other, which no row's codes notice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import pi, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.loading.ggml_types import GGML_TYPES
from tradespace.loading.gguf import GGUFFile, read_gguf, read_raw
from tradespace.loading.gguf_vocabulary import vocabulary_metadata
from tradespace.loading.gguf_writer import TensorToWrite, write_gguf
from tradespace.loading.names import Piece, gguf_pieces
from tradespace.loading.resolve import ModelFiles
from tradespace.spec.formats import find_format, refusal
from tradespace.spec.gguf_config import ARCHITECTURES, ROPE_TENSORS
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, ModelSpec
from tradespace.spec.tensors import TensorSpec, model_tensors
from tradespace.units import MiB

CHUNK_BYTES = 4 * MiB
# our format → GGML type; and GGUF's general.file_type for a file that is mostly of it
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"} | {name: name.upper() for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# families that are written from a Hugging Face folder → general.architecture
FAMILIES = {"llama": "llama", "mistral": "llama", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3"}

Rows = Callable[[str, int, int], Codes | Tensor]


def write_model(path: str | os.PathLike[str], spec: ModelSpec, files: ModelFiles, *, format_of: Callable[[TensorSpec], str], rows: Rows) -> None:
    """Writes the model of `files` (where metadata and tokenizer come from) with weights of our own, whose rows and pairs lie as `spec` says.

    format_of  of a matrix: fp32, fp16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k or q6_k. Vectors are written as F32
    rows       (canonical tensor name, start, stop) → codes of that format, or its values as floats; a norm or a bias as values: what multiplies, what is added.
               Called in runs of at most CHUNK_BYTES or of one head, each row once

    Raises UnsupportedError for a format, a width, a model or a tokenizer that GGUF cannot hold. The file appears whole or not at all.
    """
    source = read_gguf(files.weights[0]) if files.kind == "gguf" else None
    if source is not None:
        metadata, types = dict(source.metadata), dict(source.metadata_types)
    else:
        metadata, types = _metadata(spec, files)
    architecture = metadata.get("general.architecture", "")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(f"{spec.name}: GGUF architecture {architecture!r} is not written. Written: {', '.join(ARCHITECTURES)}")
    specs = {tensor.name: tensor for tensor in model_tensors(spec)}
    outgoing = [_outgoing(spec, architecture, specs[piece.target], piece, format_of) for piece in gguf_pieces(spec, architecture)]
    most = max(outgoing, key=lambda one: (one.type_name != "F32", prod(one.shape)))
    metadata |= {"general.file_type": FILE_TYPES[most.type_name], "general.quantization_version": 2}
    types |= {"general.file_type": "uint32", "general.quantization_version": "uint32"}
    tensors: list[TensorToWrite] = [(one.piece.source, one.shape, one.type_name, one.producer(rows)) for one in outgoing]
    write_gguf(path, metadata, [*tensors, *_rope_tensors(spec, source)], types=types)


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


def _metadata(spec: ModelSpec, files: ModelFiles) -> tuple[dict[str, Any], dict[str, str]]:
    """What a GGUF file says about a model of Llama's kin. Raises UnsupportedError for what its architecture has no key for."""
    if spec.family not in FAMILIES:
        raise UnsupportedError(f"{spec.name}: family {spec.family} is written to GGUF only from a GGUF file. From a folder: {', '.join(FAMILIES)}")
    name = FAMILIES[spec.family]
    mixers = [layer.mixer for layer in spec.layers]
    first, ffn = mixers[0], spec.layers[0].ffn
    assert isinstance(first, Attention) and isinstance(ffn, DenseFFN), f"{spec.family} has dense attention layers"
    rope = next((mixer.rope for mixer in mixers if isinstance(mixer, Attention) and mixer.rope is not None), None)
    if rope is None or any(layer.ffn != ffn for layer in spec.layers) or any(_shape(mixer) != _shape(first) for mixer in mixers):
        raise UnsupportedError(f"{spec.name}: layers that differ have no form in GGUF's {name}")
    windows = {mixer.window for mixer in mixers if isinstance(mixer, Attention)} - {None}
    if any(window < spec.max_context for window in windows if window is not None):
        raise UnsupportedError(f"{spec.name}: sliding windows have no key in GGUF's {name}, so llama.cpp would attend to everything")
    turning = [isinstance(mixer, Attention) and mixer.rope is not None for mixer in mixers]
    if turning != [(i + 1) % 4 != 0 if name == "smollm3" else True for i in range(spec.L)]:
        raise UnsupportedError(f"{spec.name}: which layers rotate has no key in GGUF's {name}")
    own: dict[str, Any] = {
        "block_count": spec.L,
        "context_length": spec.max_context,
        "embedding_length": spec.D,
        "feed_forward_length": ffn.F,
        "attention.head_count": first.N,
        "attention.head_count_kv": first.K,
        "attention.key_length": first.H,
        "attention.value_length": first.Hv,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.freq_base": float(rope.theta),
        "rope.dimension_count": rope.dims,
        "vocab_size": spec.V,
    }
    own |= _scaling(spec, rope)
    vocabulary, types = vocabulary_metadata(files, spec.V)
    metadata = {"general.architecture": name, "general.name": Path(spec.name).name or spec.name}
    return metadata | {f"{name}.{key}": value for key, value in own.items()} | vocabulary, types


def _shape(mixer: object) -> tuple[Any, ...]:
    """What GGUF keeps once for all layers."""
    if not isinstance(mixer, Attention) or mixer.sinks or mixer.chunked or mixer.scale is not None or mixer.logit_softcap is not None:
        return (object(),)
    return (mixer.N, mixer.K, mixer.H, mixer.Hv, mixer.qk_norm, mixer.qkv_bias, mixer.out_bias)


def _scaling(spec: ModelSpec, rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None or scaling.kind == "llama3":  # the latter lies in a tensor of factors
        return {}
    if scaling.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    defaults = (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32.0, 1.0, True)
    if scaling.kind == "yarn" and defaults and scaling.attention_factor is None and scaling.mscale is None and scaling.mscale_all_dim is None:
        original = scaling.original_context or spec.max_context
        return {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling.factor), "rope.scaling.original_context_length": original}
    raise UnsupportedError(f"{spec.name}: rotary scaling {scaling.kind} as this model has it is not written to GGUF")


def _rope_tensors(spec: ModelSpec, source: GGUFFile | None) -> list[TensorToWrite]:
    """Tensors of rotary factors: the source's own, or Llama 3.1's three bands worked out."""
    if source is not None:
        found = [source.tensors[name] for name in ROPE_TENSORS if name in source.tensors]
        return [(tensor.name, tensor.shape, tensor.type_name, lambda tensor=tensor: read_raw(tensor)) for tensor in found]
    rope = next((layer.mixer.rope for layer in spec.layers if isinstance(layer.mixer, Attention) and layer.mixer.rope is not None), None)
    if rope is None or rope.scaling is None or rope.scaling.kind != "llama3":
        return []
    factors = torch.tensor(llama3_factors(rope), dtype=torch.float32)
    return [("rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors.numpy().data.cast("B"))]


def llama3_factors(rope: Rope) -> Sequence[float]:
    """By what each frequency is divided: 1 where the wave is short, `factor` where it is long, between the two in proportion to 1 / wave (arXiv:2407.21783).

    >>> from tradespace.spec.mixers import RopeScaling
    >>> scaling = RopeScaling(kind="llama3", factor=8.0, original_context=8192)
    >>> [round(factor, 2) for factor in llama3_factors(Rope(theta=5e5, dims=128, scaling=scaling))][::9]
    [1.0, 1.0, 1.0, 1.0, 8.0, 8.0, 8.0, 8.0]
    """
    scaling = rope.scaling
    assert scaling is not None and scaling.kind == "llama3"
    low, high, found = scaling.low_freq_factor, scaling.high_freq_factor, []
    for pair in range(rope.dims // 2):
        turns = scaling.original_context * rope.theta ** (-2 * pair / rope.dims) / (2 * pi)  # within the original context
        if turns > high:
            found.append(1.0)
        elif turns < low:
            found.append(scaling.factor)
        else:
            smooth = (turns - low) / (high - low)
            found.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return found
