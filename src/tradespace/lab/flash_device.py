"""The flash kernels on a CUDA device: every pattern against the reference, forward and backward; speed beside torch's kernels; bytes held; a search for tiles.

python -m tradespace.lab.flash_device --output results/flash.json [--search tiles.json] [--commit HASH]

Needs torch, Triton and this package's sources, nothing else: it writes the record by itself, so that it runs on a machine without the rest installed.
Speed counts 4·pairs·H operations a head forward and 10·pairs·H backward, recomputation not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tradespace.kernels.attention import reference
from tradespace.kernels.attention.triton_flash import attend, flash
from tradespace.kernels.attention.triton_flash_layout import lay_out
from tradespace.kernels.attention.triton_flash_tiles import Tiles
from tradespace.kernels.view import PackedView, StepBatch
from tradespace.lab.timing import device_seconds
from tradespace.spec.attention_pattern import BlockSparse, Documents, Prefix, Selected, Sliding
from tradespace.spec.mixers import Attention

WIDTH = 2048  # heads · head size of the timed shapes
TOKENS = 16_384  # of every timed call: several sequences of 4k, one of 16k
PLAIN = Attention(N=4, K=2, H=64)
CASES: dict[str, Attention] = {
    "causal": PLAIN,
    "multi-query, head 128": Attention(N=8, K=1, H=128),
    "head 16": Attention(N=4, K=4, H=16),
    "head 40, values 24": Attention(N=4, K=2, H=40, value_H=24),
    "head 96": Attention(N=4, K=2, H=96),
    "head 256": Attention(N=4, K=2, H=256),
    "head 256, window, soft cap": Attention(N=4, K=2, H=256, window=70, logit_softcap=5.0),
    "head 128, soft cap, sinks": Attention(N=4, K=2, H=128, logit_softcap=5.0, sinks=True),
    "head 128, block-sparse": Attention(N=4, K=2, H=128, pattern=BlockSparse(block=64, local=2, leading=1, random=1)),
    "window": replace(PLAIN, window=70),
    "chunks": replace(PLAIN, window=70, chunked=True),
    "soft cap, sinks": replace(PLAIN, logit_softcap=5.0, sinks=True),
    "sliding": replace(PLAIN, pattern=Sliding(window=130)),
    "prefix": replace(PLAIN, pattern=Prefix(length=200)),
    "documents": replace(PLAIN, pattern=Documents(boundaries=(33, 250))),
    "block-sparse": replace(PLAIN, pattern=BlockSparse(block=64, local=2, leading=1, random=1)),
    "selected": replace(PLAIN, pattern=Selected(block=64, share=0.3)),
}
LENGTHS = (1, 300, 77, 513)
# (queries, keys, warps, stages) by phase and head; each is tried with pointers and with the tensor memory accelerator
SEARCHED = {
    ("forward", 64): [(64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 8, 3), (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 4, 4), (64, 256, 4, 2)],
    ("forward", 128): [(128, 128, 8, 3), (128, 64, 8, 4), (64, 128, 4, 2), (128, 128, 8, 2)],
    ("forward", 256): [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3), (64, 32, 4, 3)],
    ("keys", 64): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 2), (64, 128, 8, 3), (64, 128, 8, 4), (32, 64, 4, 4), (128, 128, 8, 2)],
    ("keys", 128): [(64, 128, 8, 3), (64, 128, 8, 4), (32, 128, 8, 4), (64, 64, 4, 3), (64, 128, 8, 2)],
    ("keys", 256): [(32, 64, 8, 2), (64, 64, 8, 1), (32, 64, 4, 1), (64, 64, 8, 2), (32, 32, 4, 2)],
    ("queries", 64): [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4), (128, 128, 8, 2), (64, 128, 4, 3), (64, 32, 4, 4)],
    ("queries", 128): [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 4), (128, 32, 8, 4)],
    ("queries", 256): [(64, 32, 8, 1), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (128, 64, 8, 1)],
}
PHASES = ("forward", "keys", "queries")


def drawn(mixer: Attention, lengths: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """q, k, v (and sinks) that want gradients, and a weight for the output."""
    gen = torch.Generator(device="cuda").manual_seed(seed)
    T = sum(lengths)
    shapes = [(T, mixer.N, mixer.H), (T, mixer.K, mixer.H), (T, mixer.K, mixer.Hv), *([(mixer.N,)] if mixer.sinks else [])]
    leaves = [torch.randn(shape, generator=gen, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randn((T, mixer.N, mixer.Hv), generator=gen, device="cuda").to(dtype)


def worst(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    got, expected = got.detach(), expected.detach()
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30))


def check(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """`compared`, or the error that it ended in."""
    try:
        return compared(name, dtype)
    except Exception as error:  # reported in the record, with the other cases
        return {"kind": "check", "case": name, "dtype": str(dtype)[6:], "error": f"{type(error).__name__}: {error}"[:400], "holds": False}


def compared(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """One case against the reference, output and gradients. bf16 inputs: the reference computes in fp32 from the same bf16 values."""
    mixer = CASES[name]
    leaves, weight = drawn(mixer, LENGTHS, dtype)
    found = []
    for kernel, held in ((reference.attend, [leaf.detach().float().requires_grad_() for leaf in leaves]), (attend, leaves)):
        out = kernel(held[0], PackedView(held[1], held[2]), StepBatch.packed(LENGTHS, device="cuda"), mixer, held[3] if mixer.sinks else None)
        found.append((out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), held)))
    names = ("output", "dq", "dk", "dv", "dsinks")
    differences = {key: worst(got, expected) for key, got, expected in zip(names, found[1], found[0], strict=False)}
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    return {"kind": "check", "case": name, "dtype": str(dtype)[6:], **differences, "limit": limit, "holds": max(differences.values()) <= limit}


def shaped(H: int, length: int) -> tuple[Attention, tuple[int, ...]]:
    return Attention(N=WIDTH // H, K=WIDTH // H, H=H), (length,) * (TOKENS // length)


def runners(mixer: Attention, lengths: tuple[int, ...], tiles: dict[str, Tiles] | None = None) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """Forward and backward of our kernels on packed sequences, the layout made beforehand, as an engine's step shares it among layers."""
    (q, k, v), weight = drawn(mixer, lengths, torch.bfloat16)
    batch = StepBatch.packed(lengths, device="cuda")
    layout = lay_out(q, k, tuple(span.query_start for span in batch.spans), batch.spans, mixer)
    out = flash(q, k, v, layout, mixer, None, tiles)
    return lambda: flash(q, k, v, layout, mixer, None, tiles), lambda: torch.autograd.grad(out, (q, k, v), weight, retain_graph=True)


def peers(mixer: Attention, lengths: tuple[int, ...], backend: SDPBackend) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """The same of torch's kernels."""
    shape = (len(lengths), mixer.N, lengths[0], mixer.H)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    out = forward()
    return forward, lambda: torch.autograd.grad(out, (q, k, v), weight, retain_graph=True)


def speed_rows(H: int, length: int, tiles: dict[str, Tiles] | None) -> list[dict[str, Any]]:
    """Ours, cuDNN's and FlashAttention-2's, causal. `tiles`: those of a search just made, instead of the data's."""
    mixer, lengths = shaped(H, length)
    pairs = len(lengths) * length * (length + 1) / 2
    rows = []
    for name in ("flash (ours)", "cuDNN", "FlashAttention-2"):
        try:
            backend = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}.get(name)
            forward, backward = runners(mixer, lengths, tiles) if backend is None else peers(mixer, lengths, backend)
            forward_s, backward_s = device_seconds(forward), device_seconds(backward)
        except RuntimeError as error:
            rows.append({"kind": "speed", "kernel": name, "head": H, "length": length, "error": str(error).splitlines()[0][:160]})
            continue
        flops = 4 * pairs * H * mixer.N
        rows.append(
            {
                "kind": "speed",
                "kernel": name,
                "head": H,
                "length": length,
                "forward_s": forward_s,
                "backward_s": backward_s,
                "forward_tflops": flops / forward_s / 1e12,
                "backward_tflops": 2.5 * flops / backward_s / 1e12,
            }
        )
    return rows


def memory_row(length: int) -> dict[str, Any]:
    """Bytes that forward and backward hold at most beside q, k, v, the output and their gradients: per token they are to stay the same."""
    mixer = Attention(N=8, K=2, H=128)
    (q, k, v), weight = drawn(mixer, (length,), torch.bfloat16)
    layout = lay_out(q, k, (0,), StepBatch.packed((length,)).spans, mixer)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = flash(q, k, v, layout, mixer)
    forward = torch.cuda.max_memory_allocated() - before - out.nbytes
    gradients = torch.autograd.grad(out, (q, k, v), weight)
    both = torch.cuda.max_memory_allocated() - before - out.nbytes - sum(g.nbytes for g in gradients)
    return {"kind": "memory", "length": length, "forward_bytes": forward, "backward_bytes": both, "lse_bytes": 4 * mixer.N * length}


def candidates(phase: str, H: int) -> list[Tiles]:
    return [Tiles(M=M, N=N, warps=warps, stages=stages, tma=tma) for M, N, warps, stages in SEARCHED[phase, H] for tma in (False, True)]


def compile_one(phase: str, H: int, tiles: Tiles) -> str | None:
    """Compiles one candidate into Triton's cache, on a short sequence; the error where it does not fit the device."""
    try:
        mixer = Attention(N=WIDTH // H, K=WIDTH // H, H=H)
        forward, backward = runners(mixer, (512,), {phase: tiles})
        forward() if phase == "forward" else backward()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return None


def search_rows(pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Seconds of every candidate of every phase at 16k, best first."""
    jobs = [(phase, H, tiles) for phase, H in SEARCHED for tiles in candidates(phase, H)]
    errors = list(pool.map(compile_one, *zip(*jobs, strict=True)))
    rows = []
    for (phase, H, tiles), error in zip(jobs, errors, strict=True):
        row: dict[str, Any] = {"kind": "search", "phase": phase, "head": H, **asdict(tiles)}
        if error is None:
            forward, backward = runners(*shaped(H, 16_384), {phase: tiles})
            row["seconds"] = device_seconds(forward if phase == "forward" else backward, 6)
        else:
            row["error"] = error
        rows.append(row)
    return sorted(rows, key=lambda row: (row["phase"], row["head"], row.get("seconds", float("inf"))))


def best_of(rows: list[dict[str, Any]]) -> dict[int, dict[str, Tiles]]:
    """The fastest tiles of a search, by head and phase."""
    found: dict[int, dict[str, Tiles]] = {}
    for row in rows:  # best first
        if "seconds" in row:
            found.setdefault(row["head"], {}).setdefault(row["phase"], Tiles(**{key: row[key] for key in ("M", "N", "warps", "stages", "tma")}))
    return found


def main(arguments: list[str]) -> int:
    """Writes the record; exit code 1 where a case differs from the reference by more than its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--search", type=Path, help="search for tiles, too, and write what was found here")
    parser.add_argument("--commit", default="unknown: no repository on this machine")
    parser.add_argument("--workers", type=int, default=12)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    dtypes = (torch.float32, torch.bfloat16)
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(check, *zip(*((name, dtype) for name in CASES for dtype in dtypes), strict=True)))
        print(f"checked {len(rows)} cases in {time.perf_counter() - start:.0f} s, {sum(not row['holds'] for row in rows)} fail", flush=True)
        for row in rows:
            if not row["holds"]:
                print(row, flush=True)
        best: dict[int, dict[str, Tiles]] = {}
        if options.search:
            found = search_rows(pool)
            options.search.write_text(json.dumps(found, indent=1), encoding="utf-8")
            best = best_of(found)
            print(f"searched {len(found)} candidates, {time.perf_counter() - start:.0f} s", flush=True)
    for H in (64, 128, 256):
        for length in (4096, 16_384):
            rows += speed_rows(H, length, best.get(H))
            for row in rows[-3:]:
                print({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    rows += [memory_row(length) for length in (4096, 16_384, 65_536)]
    properties = torch.cuda.get_device_properties(0)
    import triton

    record = {
        "schema": 1,
        "experiment": "flash",
        "command": "python -m tradespace.lab.flash_device --output results/flash.json",
        "commit": options.commit,
        "dirty": False,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"name": properties.name, "kind": "cuda", "memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__},
        "repeats": 12,
        "figures": {},
        "rows": rows,
        "notes": f"causal, bf16, {WIDTH} columns of heads, {TOKENS} tokens a call; medians; operations 4·pairs·H a head forward, 2.5 times that backward",
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output.name} after {time.perf_counter() - start:.0f} s", flush=True)
    return 0 if all(row["holds"] for row in rows if row["kind"] == "check") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
