"""Compiles the kernels of a step for an H100, which needs no card: what the interpreter lets pass and the compiler does not."""

from __future__ import annotations

import itertools
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tradespace.kernels.attention.triton_paged_decode import decode_kernel, gather_kernel
from tradespace.kernels.attention.triton_paged_kernel import ragged_kernel
from tradespace.kernels.linear.triton_rows_kernel import rows_kernel
from tradespace.kernels.optimizer.triton_adamw import adamw_kernel
from tradespace.kernels.optimizer.triton_adamw8 import adamw8_kernel
from tradespace.kernels.rope.triton_write import write_kernel

CODES = {"bf16": "*bf16", "w8a8": "*i8", "f8a8": "*fp8e4nv"}  # of weights; the others come as pairs
KINDS = ("bf16", "int8", "fp8", "int4", "nf4", "w8a8", "f8a8")
FLOATS = ("scale", "squares", "partial", "next_squares", "x_scale", "nested", "table", "offset", "sums")
WORDS = ("zero", "counters", "tables", "lengths", "key_scales", "value_scales")


def compile_for_h100(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> None:
    """Names that are no constants: pointers to bf16 unless `types` or the lists above say otherwise; "eps", "scale" and "cap" alone fp32; numbers i32."""
    names, signature = kernel.arg_names, {}
    for name in names:
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*") or name.endswith("_stride")}
    source = ASTSource(kernel, signature, constexprs={(names.index(name),): value for name, value in constants.items()}, attrs=divisible)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages, "launch_pdl": True})


def rows(kind: str, *, whole: bool, tokens: int) -> None:
    """A product: `whole`: gated, after a norm, columns that are whole tiles; else with residual and what the next norm needs, columns that are not."""
    numbers = CODES.get(kind, "*i16")
    pointers = dict.fromkeys(("x", "bias", "residual", "out", "next_weight", "next_x"), "*bf16")
    types = pointers | dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(WORDS, "*i32") | {"codes": numbers, "eps": "fp32"}
    types |= {"x": {"w8a8": "*i8", "f8a8": "*fp8e4nv"}.get(kind, "*bf16"), "scale": "*i32" if kind in ("int4", "nf4") else "*fp32"}
    constants = {
        "KIND": kind,
        "BYTES": {"int4": 2, "nf4": 1}.get(kind, 0),
        "NESTED": 256 if kind == "nf4" else 1,
        "ZERO": kind == "int4" and not whole,
        "GROUPS": 2 if kind == "int4" and whole else 1,
        "M": tokens,
        "N": 64,
        "K": 64 if kind in ("int4", "nf4") else 128,
        "SPLIT": not whole,
        "GATED": "silu" if whole else "none",
        "BIAS": not whole,
        "RESIDUAL": not whole,
        "SQUARES": 32 if whole else 0,
        "NEXT": 0 if whole else 1,
        "HALVES": not whole,
        "EVEN": whole,
        "FAST": True,
        "TYPE": tl.bfloat16,
        "STAGES": 2,
        "AHEAD": 0 if kind in CODES else 2,
        "PDL": True,
    }
    compile_for_h100(rows_kernel, types, constants, 4, 2)


def decode(code: str, *, gather: bool) -> None:
    """Attention of one query a sequence over a store of this code, split, with sinks and a window; gather: combined by a kernel of its own."""
    held = "*bf16" if code == "plain" else "*i16"
    types = {"q": "*bf16", "out": "*bf16", "sinks": "*bf16", "keys": held, "values": held, "partial": "*fp32", "scale": "fp32", "cap": "fp32"}
    types |= dict.fromkeys(WORDS, "*i32") | {"sums": "*fp32"}
    half = 1 if code == "plain" else 2
    constants = {
        "G": 3,
        "GP": 16,
        "H": 64,
        "HV": 64,
        "HP": 64 // half,
        "HVP": 64 // half,
        "N": 32,
        "P": 16,
        "LEAST": 512,
        "CODE": code,
        "PAIRED": code == "int8",
        "SPLIT": 8,
        "GATHER": gather,
        "GROUP": 4,
        "WINDOW": 1,
        "SOFTCAP": False,
        "SINKS": True,
        "FAST": True,
        "PRECISION": "tf32",
        "STAGES": 2,
        "PDL": True,
    }
    compile_for_h100(decode_kernel, types, constants, 2, 2)
    if gather:
        kept = ("HV", "N", "LEAST", "SPLIT", "WINDOW", "SINKS", "PDL")
        pointers = {"partial": "*fp32", "sums": "*fp32", "sinks": "*bf16", "lengths": "*i32", "out": "*bf16"}
        compile_for_h100(gather_kernel, pointers, {name: constants[name] for name in kept} | {"C": 32}, 2, 2)


def ragged(code: str) -> None:
    """Attention of a mixed step over a store of this code, with sinks, in the tiles that a device gets."""
    held = "*bf16" if code == "plain" else "*i16"
    types = {"q": "*bf16", "out": "*bf16", "sinks": "*bf16", "keys": held, "values": held, "scale": "fp32", "cap": "fp32"}
    types |= dict.fromkeys(("tables", "starts", "lengths", "key_scales", "value_scales"), "*i32")
    half = 64 if code == "plain" else 32
    constants = {"G": 4, "GROUP": 4, "M": 128, "H": 64, "HV": 64, "HP": half, "HVP": half, "N": 32, "P": 32, "CODE": code, "PAIRED": code == "int8"}
    constants |= {"WINDOW": 0, "PREFIX": False, "SOFTCAP": False, "SINKS": True, "FAST": True, "PRECISION": "tf32", "STAGES": 5}
    compile_for_h100(ragged_kernel, types, constants, 4, 5)


def writes(code: str, *, whole: bool) -> None:
    """Rotation and cache writes. whole: of whole heads without norms, with the keys kept; else of part of a head under norms."""
    held = {"plain": "*bf16", "int8": "*i8", "fp8": "*u8"}[code]
    types = dict.fromkeys(("qkv", "q_out", "k_out", "q_norm", "k_norm"), "*bf16") | dict.fromkeys(("keys", "values"), held)
    types |= {"table": "*fp32", "positions": "*i64", "slots": "*i64", "key_scales": "*fp16", "value_scales": "*fp16", "eps": "fp32"}
    constants = {"H": 128, "HV": 128, "HP": 128, "HVP": 128, "DIMS": 128 if whole else 96, "INTERLEAVED": False, "NORMS": not whole, "CODE": code}
    constants |= {"KEPT": whole, "HEADS": 8, "FAST": True, "PDL": True}
    compile_for_h100(write_kernel, types, constants, 4, 2)


def steps_of_adamw(*, coded: bool) -> None:
    """AdamW's step of a bf16 parameter with its master, moments in fp32 or in 8 bits."""
    types = dict.fromkeys(("held", "m", "v", "m_scales", "v_scales", "m_levels", "m_edges", "v_levels", "v_edges"), "*fp32")
    types |= {"parameter": "*bf16", "gradient": "*bf16", "m_codes": "*u8", "v_codes": "*u8"}
    types |= dict.fromkeys(("lr", "beta1", "beta2", "eps", "decay", "bias1", "bias2"), "fp32")
    constants = {"MASTER": True} | ({"BLOCKS": 4, "SIZE": 256} if coded else {"BLOCK": 2048})
    compile_for_h100(adamw8_kernel if coded else adamw_kernel, types, constants, 4 if coded else 8, 2)


if __name__ == "__main__":
    for kind, (whole, tokens) in itertools.product(KINDS, ((True, 64), (False, 8))):
        rows(kind, whole=whole, tokens=tokens)
        print("rows", kind, whole, tokens, flush=True)
    for code in ("plain", "int8", "fp8"):
        decode(code, gather=code != "fp8")
        ragged(code)
        print("decode and ragged", code, flush=True)
    for code, whole in itertools.product(("plain", "int8", "fp8"), (True, False)):
        writes(code, whole=whole)
        print("writes", code, whole, flush=True)
    for coded in (False, True):
        steps_of_adamw(coded=coded)
        print("adamw", coded, flush=True)
