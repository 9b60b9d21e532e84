"""The C interface of the native kernels: structures as `source/*.h` has them, functions with their argument types, and the library itself, loaded once."""

from __future__ import annotations

import ctypes as c
from functools import lru_cache

from tradespace.errors import EngineError
from tradespace.kernels.native.compiler import best_isa, compile_library


class Matrix(c.Structure):
    """A packed matrix (`source/weights.h`)."""

    _fields_ = (
        ("data", c.c_void_p),
        ("rows", c.c_int64),
        ("columns", c.c_int64),
        ("kind", c.c_int32),
        ("group", c.c_int32),
        ("panel_bytes", c.c_int64),
    )


class Operand(c.Structure):
    """Activations in the form that a product reads (`source/activations.h`)."""

    _fields_ = (
        ("f32", c.c_void_p),
        ("bf16", c.c_void_p),
        ("codes", c.c_void_p),
        ("scales", c.c_void_p),
        ("weighted", c.c_void_p),
        ("sums", c.c_void_p),
        ("stride", c.c_int64),
        ("sections", c.c_int64),
    )


class Step(c.Structure):
    """A step's sequences (`source/attention.h`)."""

    _fields_ = (
        ("tokens", c.c_void_p),
        ("positions", c.c_void_p),
        ("starts", c.c_void_p),
        ("lengths", c.c_void_p),
        ("tables", c.c_void_p),
        ("rows", c.c_void_p),
        ("num_tokens", c.c_int64),
        ("num_sequences", c.c_int64),
        ("table_width", c.c_int64),
        ("num_rows", c.c_int64),
    )


class Cache(c.Structure):
    """One layer's planes (`source/attention.h`)."""

    _fields_ = (
        ("keys", c.c_void_p),
        ("values", c.c_void_p),
        ("block_size", c.c_int64),
        ("store", c.c_int32),
        ("heads", c.c_int32),
        ("key_width", c.c_int32),
        ("value_width", c.c_int32),
        ("key_scales", c.c_void_p),
        ("value_scales", c.c_void_p),
    )


class Op(c.Structure):
    """One operation of a step (`source/program.cpp`)."""

    _fields_ = (
        *((name, c.c_int32) for name in ("kind", "wait", "form", "choice", "flags", "heads", "kv_heads", "head_width")),
        *((name, c.c_int32) for name in ("value_width", "dims", "chunked", "operand_rows")),
        *((name, c.c_float) for name in ("eps", "scale", "softcap", "unused")),
        *((name, c.c_void_p) for name in ("in_", "out", "weight", "bias", "second", "table")),
        *((name, c.c_int64) for name in ("in_stride", "out_stride", "width", "window")),
        ("matrix", Matrix),
        ("positions", Matrix),
        ("operand", Operand),
        ("cache", Cache),
        ("partials", c.c_void_p),
        ("slots", c.c_int64),
    )


class Choice(c.Structure):
    """A row of logits and how a token is chosen from it (`source/sample.cpp`)."""

    _fields_ = (
        ("logits", c.c_void_p),
        ("key", c.c_int64),
        ("top_k", c.c_int64),
        ("token", c.c_int64),
        ("top_p", c.c_double),
        ("temperature", c.c_float),
        ("min_logit", c.c_float),
    )


_PTR, _I64, _I32 = c.c_void_p, c.c_int64, c.c_int32
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ts_op_bytes": (_I64, ()),
    "ts_panel_bytes": (_I64, (_I32, _I64, _I32)),
    "ts_partial_floats": (_I64, (_I64,)),
    "ts_pack_gguf": (None, (_PTR, _PTR, _I64, _PTR, _I64)),
    "ts_pack_codes": (None, (_PTR, _PTR, _I64, _PTR, _PTR, _PTR, _I64)),
    "ts_pack_dense": (None, (_PTR, _PTR, _I64, _PTR)),
    "ts_unpack_rows": (None, (_PTR, _PTR, _I64, _PTR)),
    "ts_linear": (None, (_PTR, _PTR, _PTR, _I64, _I64, _I32, _PTR, _PTR, _I64, _I32)),
    "ts_choice_bytes": (_I64, ()),
    "ts_sample": (None, (_PTR, _I64, _I64, _PTR, _I32)),
    "ts_run": (None, (_PTR, _I64, _PTR, _PTR, _I64, _I32, _PTR)),
}


class Library:
    """The loaded kernels of one instruction set; its functions are attributes named as in C."""

    def __init__(self, isa: str, path: str):
        self.isa, self.path = isa, path
        self._dll = c.CDLL(path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._dll, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        assert self.ts_op_bytes() == c.sizeof(Op), f"library.Op has {c.sizeof(Op)} bytes, program.cpp's {self.ts_op_bytes()}"
        assert self.ts_choice_bytes() == c.sizeof(Choice), f"library.Choice has {c.sizeof(Choice)} bytes, sample.cpp's {self.ts_choice_bytes()}"

    def __getattr__(self, name: str):
        raise AttributeError(f"the native kernels have no function {name}")


@lru_cache(maxsize=8)
def load(isa: str | None = None) -> Library:
    """The kernels for `isa` (default: the best that this CPU has), compiled if need be. Raises EngineError saying why that cannot be."""
    isa = isa or best_isa()
    path = compile_library(isa)
    try:
        return Library(isa, str(path))
    except OSError as error:
        raise EngineError(f"the compiled CPU kernels in {path} cannot be loaded: {error}") from error


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the native kernels cannot run here; None: they can (and are compiled now)."""
    try:
        load()
    except EngineError as error:
        return str(error)
    return None
