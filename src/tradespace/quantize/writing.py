"""Quantized tensors under the names that a checkpoint of the Hugging Face kind has, and the files around them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats import DTYPES, Codes
from tradespace.loading.compressed_tensors import OWN_METHOD, export_tensors, folds, quantization_config
from tradespace.loading.gguf import GGUFFile
from tradespace.loading.names import Piece, hugging_face_pieces
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.weights import Source
from tradespace.quantize.hf_config import config_from_spec, write_json, write_tokenizer
from tradespace.quantize.rtn import round_to_nearest
from tradespace.quantize.shards import sync_folder
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.spec.weights import WeightPlan

# beside weights and config.json, what makes a folder a model
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass
class Checkpoint:
    """How the tensors of one model are called and stored. `dtype` holds what no format does; `config` is the config.json without quantization.

    fold  whether zero points are folded into codes (`loading/compressed_tensors`)
    """

    spec: ModelSpec
    config: dict[str, Any]
    dtype: torch.dtype
    pieces: dict[str, list[Piece]]
    fold: bool

    @classmethod
    def of(cls, files: ModelFiles, source: Source, spec: ModelSpec, plan: WeightPlan) -> Checkpoint:
        """For the model of `files`, whose spec (rotary pairs in halves, perhaps untied) is `spec`. Raises UnsupportedError where no config.json can say it."""
        dtype = plan.dense
        if isinstance(source, GGUFFile):
            config = config_from_spec(spec, dtype=str(DTYPES[dtype]).removeprefix("torch."))
            names: Mapping[str, Any] = {}
        else:
            assert files.config is not None, "a safetensors model was resolved with its config"
            config = {**files.config, "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}
            config.pop("dtype", None)
            config.pop("quantization_config", None)
            if spec.tied != files.config.get("tie_word_embeddings", spec.tied) or not spec.tied:
                config["tie_word_embeddings"] = spec.tied
            names = source.tensors
        pieces: dict[str, list[Piece]] = {}
        for piece in hugging_face_pieces(model_spec_from_config(config, spec.name), names):
            pieces.setdefault(piece.target, []).append(piece)
        found = cls(spec, config, DTYPES[dtype], pieces, fold=False)
        formats = found.module_formats(plan)
        is_ours = quantization_config(formats)["quant_method"] == OWN_METHOD
        found = replace(found, fold=not is_ours and folds(formats.values()))
        found.check_widths(formats)
        return found

    def check_widths(self, formats: Mapping[str, str]) -> None:
        """Raises UnsupportedError, naming the first module whose width its format cannot be stored in: before anything is written, and not at that module."""
        seen: set[tuple[str, int]] = set()
        for piece in (piece for pieces in self.pieces.values() for piece in pieces if not piece.is_vector):
            module = piece.source.removesuffix(".weight")
            fmt = formats.get(module, "bf16")
            if fmt in DTYPES or (fmt, piece.num_columns) in seen:
                continue
            seen.add((fmt, piece.num_columns))
            if piece.transposed:
                raise UnsupportedError(f"{module}: {self.spec.family} stores its matrices as (in, out), which no quantized checkpoint does. Use --to gguf")
            export_tensors(module, fmt, _empty_like(fmt, piece.num_columns), (32, piece.num_columns), fold=self.fold)

    @property
    def norm_offset(self) -> float:
        """What a stored norm lacks (Gemma's 1)."""
        return self.pieces["final_norm.weight"][0].added if self.spec.final_norm else 0.0

    def dense(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """A norm, bias or matrix (canonical `name`, whole) that stays dense, in `dtype` or the model's; a norm in fp32 where that would change it."""
        dtype = self.dtype if dtype is None else dtype
        found: dict[str, Tensor] = {}
        for piece in self.pieces[name]:
            rows = _stored_rows(piece, values)
            rows = rows - piece.added if piece.added else rows
            narrow = rows.to(dtype)
            kept = narrow if not piece.is_vector or torch.equal(narrow.float(), rows.float()) else rows
            found[piece.source] = (kept.T if piece.transposed else kept).contiguous()
        return found

    def quantized(self, name: str, fmt: str, codes: Codes) -> dict[str, Tensor]:
        """A matrix as codes of all its rows. Raises UnsupportedError for one that the checkpoint stores as (in, out)."""
        if fmt in DTYPES:
            return self.dense(name, codes.codes_RC, DTYPES[fmt])
        found: dict[str, Tensor] = {}
        for piece in self.pieces[name]:
            module = piece.source.removesuffix(".weight")
            if piece.transposed:
                raise UnsupportedError(f"{module}: {self.spec.family} stores its matrices as (in, out), which no quantized checkpoint does. Use --to gguf")
            found |= export_tensors(module, fmt, _stored_codes(piece, codes), (piece.num_rows, piece.num_columns), fold=self.fold)
        return found

    def quantized_chunks(self, name: str, fmt: str, chunks: Iterator[Codes]) -> tuple[Iterator[dict[str, Tensor]], dict[str, Tensor]]:
        """The same for a matrix that comes in runs of rows (multiples of 32 but for the last): (parts in order, tensors that are whole from the start)."""
        (piece,) = self.pieces[name]
        module = piece.source.removesuffix(".weight")
        shape_name = f"{module}.weight_shape"

        def parts() -> Iterator[dict[str, Tensor]]:
            for codes in chunks:
                if fmt in DTYPES:
                    yield {piece.source: codes.codes_RC}
                    continue
                found = export_tensors(module, fmt, codes, (len(codes), piece.num_columns), fold=self.fold)
                yield {key: tensor for key, tensor in found.items() if key != shape_name}

        packed = f"{module}.weight_packed"
        probe = {} if fmt in DTYPES else export_tensors(module, fmt, _empty_like(fmt, piece.num_columns), (32, piece.num_columns), fold=self.fold)
        return parts(), {shape_name: torch.tensor([piece.num_rows, piece.num_columns])} if packed in probe else {}

    def module_formats(self, plan: WeightPlan) -> dict[str, str]:
        """The format of every module that holds a matrix."""
        found: dict[str, str] = {}
        for tensor in model_tensors(self.spec):
            if tensor.name.endswith(".weight") and len(tensor.shape) > 1:
                found |= {piece.source.removesuffix(".weight"): plan.format_of(tensor).name for piece in self.pieces[tensor.name]}
        return found

    def finish(self, folder: Path, plan: WeightPlan, weight_map: Mapping[str, str], total_bytes: int, files: ModelFiles, source: Source) -> Path:
        """config.json, the index and the tokenizer's files beside the shards: `folder` is then the checkpoint."""
        formats, config = self.module_formats(plan), dict(self.config)
        if any(fmt not in DTYPES for fmt in formats.values()):
            config["quantization_config"] = quantization_config(formats)
        write_json(folder / "config.json", config)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))})
        if isinstance(source, GGUFFile):
            write_tokenizer(source, folder)
        else:
            for name in _COPIED:
                if (files.folder / name).is_file():
                    shutil.copyfile(files.folder / name, folder / name)
        sync_folder(folder)
        return folder


def _places(piece: Piece) -> Tensor:
    """Where in the target each stored row is."""
    return torch.tensor([piece.row_start + piece.target_row(row) for row in range(piece.num_rows)])


def _stored_rows(piece: Piece, values: Tensor) -> Tensor:
    return values[piece.row_start : piece.row_start + piece.num_rows] if piece.order == "stacked" else values[_places(piece)]


def _stored_codes(piece: Piece, codes: Codes) -> Codes:
    return codes[piece.row_start : piece.row_start + piece.num_rows] if piece.order == "stacked" else codes[_places(piece)]


def _empty_like(fmt: str, columns: int) -> Codes:

    return round_to_nearest(fmt, torch.zeros(32, columns))
