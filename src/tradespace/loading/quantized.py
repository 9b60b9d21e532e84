"""Checkpoints that are quantized already → our formats, without quantizing again: what is held means, value by value, what the checkpoint's own code means.

Every convention is a file `checkpoint_*.py`; this one asks it for each matrix: in which of our formats, from which stored tensors. Three q, k, v matrices are
held as one: where their formats differ, or a 128 × 128 block would straddle two of them, the whole is held as floats, dequantized, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.formats import decode
from tradespace.formats.codes import Codes
from tradespace.formats.quantized import DECODE_BYTES_PER_ELEMENT
from tradespace.loading.checkpoint_awq import AWQ
from tradespace.loading.checkpoint_bitsandbytes import BitsAndBytes
from tradespace.loading.checkpoint_compressed import CompressedTensors
from tradespace.loading.checkpoint_fp8 import BlockFP8
from tradespace.loading.checkpoint_gptq import GPTQ
from tradespace.loading.checkpoint_own import Own
from tradespace.loading.checkpoint_tensors import Convention, Stored, check_parts, read_strip
from tradespace.loading.names import Piece, hugging_face_pieces
from tradespace.loading.rawfile import shown
from tradespace.loading.safetensors import SafetensorsFile
from tradespace.loading.weights import Fill, check_piece, check_surplus, load_piece, target_rows
from tradespace.spec.formats import find_format
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import QUANTIZABLE_ROLES, TensorSpec, model_tensors
from tradespace.spec.weights import WeightPlan
from tradespace.units import format_bytes

METHODS = ("compressed-tensors", "tradespace", "gptq", "awq", "bitsandbytes", "fp8")
# endings that a quantized weight is known by: which prefix the checkpoint's names have is read off them
_WEIGHT_PARTS = (".weight_packed", ".weight_codes", ".qweight")


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says about quantization, wherever it stands; None: nothing."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key) is not None:
                return place[key]
    return None


def read_convention(config: Mapping[str, Any], spec: ModelSpec, source: SafetensorsFile | None = None) -> Convention:
    """The convention of a config.json with a quantization_config, read to the letter. Raises UnsupportedError, naming the field that cannot be honoured."""
    settings = quantization_settings(config)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method is None and isinstance(settings, Mapping) and "load_in_4bit" in settings:
        method = "bitsandbytes"  # its first configs did not name it
    if not isinstance(settings, Mapping) or method not in METHODS:
        what = "is missing" if method is None else f"= {shown(method)} is not read here"
        raise UnsupportedError(f"quantization_config.quant_method {what}. Read: {', '.join(METHODS)}. Use the model's bf16 weights")
    if method == "gptq":
        return GPTQ(settings, source, spec)
    kinds = {"compressed-tensors": CompressedTensors, "tradespace": Own, "awq": AWQ, "bitsandbytes": BitsAndBytes, "fp8": BlockFP8}
    return kinds[method](settings, source)


def stored_formats(config: Mapping[str, Any], spec: ModelSpec, source: SafetensorsFile | None = None) -> WeightPlan:
    """The plan that holds a quantized checkpoint as it is stored: a format by role, or by "layer:role" where a role is not uniform.

    With the `source`, what only the files tell (act-order, which modules bitsandbytes left alone) is looked up there. Raises UnsupportedError (the field).
    """
    convention = read_convention(config, spec, source)
    pieces = hugging_face_pieces(spec, _weight_names(source.tensors) if source is not None else ())
    by_target: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_target.setdefault(piece.target, []).append(piece)
    found = {
        (tensor.layer, tensor.role): _format_of(convention, spec, tensor, by_target[tensor.name])
        for tensor in model_tensors(spec)
        if tensor.role in QUANTIZABLE_ROLES and tensor.name.endswith(".weight")
    }
    return _plan(found, spec)


def _weight_names(stored: Collection[str]) -> set[str]:
    """The stored names, and each quantized weight under the name that it had before."""
    return {*stored, *(name.removesuffix(part) + ".weight" for part in _WEIGHT_PARTS for name in stored if name.endswith(part))}


def _module(piece: Piece) -> str:
    return piece.source.removesuffix(".weight")


def _format_of(convention: Convention, spec: ModelSpec, tensor: TensorSpec, pieces: list[Piece]) -> str:
    whole = [_module(piece) for piece in pieces]
    formats = {convention.format_of(module, whole=whole) or spec.stored_dtype for module in whole}
    name = next(iter(formats))
    if len(formats) == 1 and not _straddles(name, pieces):
        return name
    why = f"its parts are stored as {', '.join(sorted(formats))}" if len(formats) > 1 else "blocks would straddle its parts"
    convention.notes.append(f"{tensor.name} is held in {spec.stored_dtype}, dequantized: {why}")
    return spec.stored_dtype


def _straddles(name: str, pieces: list[Piece]) -> bool:
    scale_rows = find_format(name).scale_rows
    return scale_rows > 1 and any(piece.row_start % scale_rows for piece in pieces)


def _plan(found: Mapping[tuple[int, str], str], spec: ModelSpec) -> WeightPlan:
    """The format of most of the layers' matrices as the default; a role's own where it is uniform and another; the rest layer by layer."""
    inside = [name for (layer, _), name in found.items() if layer >= 0] or list(found.values())
    # a format of codes if there is any: the default also says in which dtype activations are
    coded = [name for name in inside if find_format(name).group is not None or find_format(name).block is not None] or inside
    default = max(dict.fromkeys(coded), key=coded.count)
    exceptions: dict[str, str] = {}
    for role in dict.fromkeys(role for _, role in found):
        names = {layer: name for (layer, of), name in found.items() if of == role}
        if len(set(names.values())) == 1:
            name = next(iter(names.values()))
            if name != default:
                exceptions[role] = name
        else:
            exceptions |= {f"{layer}:{role}": name for layer, name in names.items() if name != default}
    return WeightPlan(default=default, exceptions=exceptions)


def load_quantized(
    model: nn.Module,
    source: SafetensorsFile,
    spec: ModelSpec,
    *,
    config: Mapping[str, Any],
    fill: Fill,
    staging_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Fills `model` from a quantized checkpoint whose config.json is `config`; returns notes on what is held in another way than it is stored.

    A matrix that the model holds in the stored format gets the stored codes. One that it holds in another goes through `fill` as fp32 values: into fp32 that is
    exact, into fp16 or bf16 a rounding, into another code a second quantization, which is the plan's choice. Everything else loads as `load_weights` does,
    with the same checks before the first byte is read and the same bound on what is staged.
    """
    convention = read_convention(config, spec, source)
    pieces = hugging_face_pieces(spec, _weight_names(source.tensors))
    wholes: dict[str, list[str]] = {}
    for piece in pieces:
        wholes.setdefault(piece.target, []).append(_module(piece))
    plans: list[tuple[Piece, Stored | None]] = []
    used: set[str] = set()
    for piece in pieces:
        stored = _stored(convention, piece, wholes[piece.target])
        plans.append((piece, stored))
        if stored is None:
            check_piece(source, piece, spec)
            used.add(piece.source)
        else:
            check_parts(source, _module(piece), stored.parts)
            used.update(f"{_module(piece)}.{part.suffix}" for part in stored.parts)
    check_surplus(source, used, spec)
    total_bytes, done_bytes = sum(source.tensors[name].nbytes for name in used), 0
    for piece, stored in plans:
        if stored is None:
            load_piece(model, source, piece, fill, staging_bytes)
            done_bytes += source.tensors[piece.source].nbytes
        else:
            _load_codes(model, piece, stored, fill, staging_bytes)
            done_bytes += sum(source.tensors[f"{_module(piece)}.{part.suffix}"].nbytes for part in stored.parts)
        if progress is not None:
            progress(done_bytes, total_bytes)
    return tuple(convention.notes)


def _stored(convention: Convention, piece: Piece, whole: Sequence[str]) -> Stored | None:
    if piece.is_vector or not piece.source.endswith(".weight") or convention.format_of(_module(piece), whole=whole) is None:
        return None
    if piece.transposed:
        raise UnsupportedError(f"{_module(piece)}: quantization_config: a quantized matrix that is stored as (in, out) is not read here")
    return convention.stored(_module(piece), (piece.num_rows, piece.num_columns), whole=whole)


def _load_codes(model: nn.Module, piece: Piece, stored: Stored, fill: Fill, staging_bytes: int) -> None:
    weight: Any = model.get_submodule(piece.target.rsplit(".", 1)[0])
    name = shown(piece.source)
    as_stored = find_format(weight.format_name).name == find_format(stored.fmt).name
    step = find_format(stored.fmt).scale_rows
    as_stored = as_stored and (step <= 1 or piece.row_start % step == 0)
    # decoded: the values, and what a codec takes beside
    row_bytes = stored.row_bytes + (4 if as_stored else 4 + DECODE_BYTES_PER_ELEMENT) * piece.num_columns
    chunk_rows = staging_bytes // row_bytes
    if chunk_rows < 1:
        raise BudgetError(
            f"tensor {name}: one row of {piece.num_columns} codes needs {format_bytes(row_bytes)} of staging; it has {format_bytes(staging_bytes)}",
            need_bytes=row_bytes,
            have_bytes=staging_bytes,
        )
    for start in range(0, piece.num_rows, chunk_rows):
        stop = min(start + chunk_rows, piece.num_rows)
        read = stored.read(start, stop)
        _check_finite(read, name)
        rows = target_rows(piece, start, stop - start)
        if as_stored and isinstance(read, Codes):
            weight.set_rows(slice(rows, rows + stop - start) if isinstance(rows, int) else rows, read)
        else:
            values_RC: Tensor = decode(stored.fmt, read) if isinstance(read, Codes) else read
            fill(weight, rows, values_RC, name=name)


def _check_finite(read: Codes | Tensor, name: str) -> None:
    """Raises InputError for scales, or codes that are floats themselves, that are NaN or infinite."""
    if isinstance(read, Codes):
        if read.scale_RG is not None and not read.scale_RG.isfinite().all():
            raise InputError(f"tensor {name}: a scale is NaN or infinite. The checkpoint is damaged, or training had diverged")
        if read.codes_RC.dtype == torch.float8_e4m3fn and (read.codes_RC.view(torch.uint8) & 0x7F == 0x7F).any():
            raise InputError(f"tensor {name} holds NaN. The checkpoint is damaged, or training had diverged")


def _joined(found: Sequence[tuple[str, Codes | Tensor]]) -> Codes | Tensor:
    """Runs of rows one after the other: as codes where all are of one format, else as values."""
    codes = [read for _, read in found if isinstance(read, Codes) and read.nested_RG is None]
    if len(codes) < len(found) or len({fmt for fmt, _ in found}) > 1:
        return torch.cat([decode(fmt, read) if isinstance(read, Codes) else read for fmt, read in found])
    scales, zeros = ([part for part in (getattr(one, field) for one in codes) if part is not None] for field in ("scale_RG", "zero_RG"))
    return Codes(torch.cat([one.codes_RC for one in codes]), torch.cat(scales) if scales else None, torch.cat(zeros) if zeros else None)


def checkpoint_rows(source: SafetensorsFile, spec: ModelSpec, config: Mapping[str, Any]) -> Callable[[str, int, int], Codes | Tensor]:
    """(canonical tensor name, start, stop) → its rows out of a checkpoint, quantized or not: what `gguf_export.write_model` reads.

    Codes where all of the rows are stored in one of our formats, else values as fp32; of a norm, what multiplies.
    """
    convention = read_convention(config, spec, source) if quantization_settings(config) is not None else None
    by_target: dict[str, list[Piece]] = {}
    for piece in hugging_face_pieces(spec, _weight_names(source.tensors)):
        by_target.setdefault(piece.target, []).append(piece)

    def rows(name: str, start: int, stop: int) -> Codes | Tensor:
        pieces: list[Piece] = by_target[name]
        found: list[tuple[str, Codes | Tensor]] = []
        whole = [_module(piece) for piece in pieces]
        for piece in pieces:
            first, last = max(start, piece.row_start) - piece.row_start, min(stop, piece.row_start + piece.num_rows) - piece.row_start
            if first >= last:
                continue
            if piece.order != "stacked" or piece.transposed:
                raise UnsupportedError(f"{piece.source}: rows that are stored in another order than they are held are not read one by one")
            stored = None if convention is None else _stored(convention, piece, whole)
            if stored is None:
                check_piece(source, piece, spec)
                values = read_strip(source.tensors[piece.source], (first, last)).float()
                found.append(("fp32", (values.view(-1) if piece.is_vector else values) + piece.added))
            else:
                check_parts(source, _module(piece), stored.parts)
                found.append((stored.fmt, stored.read(first, last)))
                _check_finite(found[-1][1], shown(piece.source))
        return found[0][1] if len(found) == 1 else _joined(found)

    return rows
