"""The kernels in CUDA C++, compiled for the CPU and run by fibers (tests/emulator/emulator.h), against plain arithmetic in float64.

What an emulator cannot find (a wait that is missing) the card's checker has to; what it finds: every index, layout, rounding and sum.
"""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tradespace.kernels.attention import one_query
from tradespace.kernels.attention.paged import Planes
from tradespace.kernels.cuda_module import PRIMITIVES
from tradespace.kernels.linear import stream_row
from tradespace.kernels.linear.packed import PackedWeight, allocate, codes_of
from tradespace.kernels.linear.scratch import Scratch
from tradespace.kernels.linear.triton_rows import NextNorm
from tradespace.spec.cuda import FORMATS, squares_tiles
from tradespace.spec.mixers import Attention, Rope

EMULATOR = Path(__file__).parents[1] / "emulator" / "emulator.h"
ROOM = (233_472 - stream_row.BESIDE_BYTES) // 2 - 1024  # of shared memory, on an H100


class Emulated:
    """A kernel source as a library of the CPU."""

    def __init__(self, source: Path, kernels: list[tuple[str, str]], parameters: str, folder: Path):
        compiler = shutil.which("g++") or pytest.skip("no g++ on this machine")
        table = "\n".join(f'    {{"{name}", [](const void* p) {{ {name}(*(const {parameters}*)p); }}}},' for name, _ in kernels)
        instances = "\n".join(instance for _, instance in kernels)
        text = f"""{EMULATOR.read_text(encoding="utf-8")}
{source.read_text(encoding="utf-8")}
{instances}
struct Named {{ const char* name; void (*kernel)(const void*); }};
static const Named named[] = {{
{table}
}};
extern "C" int emulate(const char* name, const void* parameters, int x, int y, int threads, int shared_bytes, int ranks) {{
    for (const Named& some : named)
        if (!strcmp(some.name, name)) {{
            emulator::run(some.kernel, parameters, x, y, threads, shared_bytes, ranks);
            return 0;
        }}
    return 1;
}}
"""
        path = folder / f"{source.stem}.cpp"
        path.write_text(text, encoding="utf-8")
        library = folder / f"{source.stem}.so"
        subprocess.run([compiler, "-O1", "-std=c++17", "-fPIC", "-shared", "-w", str(path), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))

    def __call__(self, name: str, blocks: tuple[int, int], threads: int, shared_bytes: int, parameters: ctypes.Structure, ranks: int = 1) -> None:
        assert self.library.emulate(name.encode(), ctypes.byref(parameters), *blocks, threads, shared_bytes, ranks) == 0, f"no kernel {name}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = [stream_row.kernel_of(kind, slots) for kind in stream_row.KINDS for slots in (2, 5)]
    return Emulated(stream_row.SOURCE, kernels, "Product", tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = [one_query.kernel_of(Attention(N=G, K=1, H=H)) for G, H in ((1, 64), (3, 64), (4, 128))]
    return Emulated(one_query.SOURCE, kernels, "Query", tmp_path_factory.mktemp("queries"))


def drawn(format_name: str, rows: int, columns: int, gen: torch.Generator) -> tuple[PackedWeight, torch.Tensor]:
    """A weight of random codes, and what it is in float64."""
    weight = allocate(format_name, (rows, columns), "cpu")
    layout = FORMATS[format_name]
    assert weight.scale is not None and layout.group is not None
    weight.codes.copy_(torch.randint(0, 256, weight.codes.shape, generator=gen, dtype=torch.uint8))
    if format_name == "fp8":
        weight.codes[(weight.codes & 127) == 127] = 5  # no NaN
    weight.scale.copy_((torch.rand(weight.scale.shape, generator=gen) * 0.02 + 0.01).to(weight.scale.dtype))
    codes_RC, scale_RG, _ = codes_of(weight, slice(0, rows))
    if format_name == "int8":
        values = codes_RC.view(torch.int8).double()
    elif format_name == "fp8":
        values = codes_RC.view(torch.float8_e4m3fn).double()
    else:
        values = codes_RC.double() - 8
    assert scale_RG is not None
    each = layout.group or columns
    return weight, values * scale_RG.double().repeat_interleave(each, 1)[:, :columns]


def activated(x: torch.Tensor, name: str) -> torch.Tensor:
    functional = torch.nn.functional
    plain = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu, "relu2": lambda y: functional.relu(y).square()}
    return functional.gelu(x, approximate="tanh") if name == "gelu_tanh" else plain[name](x)


# rows, columns, activation, multiprocessors (few: whole rows would be uneven), slots of a warp's ring
SHAPES = (
    (64, 128, None, 2, 5),
    (96, 1000, None, 4, 2),
    (160, 640, None, 132, 5),
    (48, 1024, None, 2, 5),
    (48, 2560, None, 5, 2),
    (192, 576, "silu", 7, 5),
    (64, 264, "gelu_tanh", 132, 2),
    (96, 384, "gelu", 2, 5),
    (32, 136, "relu", 1, 2),
    (640, 256, "relu2", 3, 5),
)


@pytest.mark.parametrize("format_name", ["int8", "fp8", "int4-g128"])
@pytest.mark.parametrize(("R", "C", "gated", "multiprocessors", "slots"), SHAPES)
def test_one_row(rows: Emulated, format_name: str, R: int, C: int, gated: str | None, multiprocessors: int, slots: int, monkeypatch: pytest.MonkeyPatch):
    gen = torch.Generator().manual_seed(R * C)
    weight, dense = drawn(format_name, R, C, gen)
    scratch, held = Scratch("cpu"), R // (2 if gated else 1)
    monkeypatch.setattr(stream_row, "MOST_SLOTS", slots)
    for split in (0, 10**9):  # rows in parts, or whole
        monkeypatch.setattr(stream_row, "SPLIT_BYTES", split)
        stream_row.shape_of.cache_clear()
        shape = stream_row.shape_of(weight.layout.kind, R, C, gated is not None, multiprocessors, ROOM)
        assert shape.slots == slots
        for normed, ended in ((False, False), (True, not gated)):
            x = (torch.randn(1, C, generator=gen) * 3).bfloat16()
            squares = torch.rand(1, squares_tiles(C, 1), generator=gen) if normed else None
            bias = torch.randn(R, generator=gen).bfloat16() if normed else None
            residual = torch.randn(1, held, generator=gen).bfloat16() if ended else None
            after = None
            if ended:
                empty = torch.full((1, squares_tiles(held, 1)), float("nan"))
                after = NextNorm(weight_R=torch.rand(held, generator=gen) + 0.5, x_TR=torch.zeros(1, held, dtype=torch.bfloat16), squares_TS=empty)
            out = torch.full((1, held), float("nan"), dtype=torch.bfloat16 if ended else torch.float32)
            parameters = stream_row.parameters_of(x, weight, scratch, out, shape, bias, residual, gated, squares, 1e-5, after)
            for _ in range(2):  # counters are as they were
                rows(stream_row.kernel_of(weight.layout.kind, slots)[0], (shape.blocks, 1), stream_row.WARPS * 32, shape.shared_bytes, parameters)
            y = x.double() @ dense.T
            if squares is not None:
                y *= torch.rsqrt(squares.double().sum() / C + 1e-5)
            if bias is not None:
                y += bias.double()
            if gated:
                y = activated(y[:, :held], gated) * y[:, held:]
            if residual is not None:
                y += residual.double()
            scale = y.abs().max()
            assert (out.double() - y).abs().max() <= (0.005 if ended else 2e-4) * scale, f"{shape}, normed {normed}"
            if after is not None:
                torch.testing.assert_close(after.squares_TS.sum(1), out.float().square().sum(1), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(after.x_TR.float(), (out.float() * after.weight_R).bfloat16().float(), rtol=0.008, atol=1e-6)
            assert not scratch.counters.any(), "counters are zero between products"
    stream_row.shape_of.cache_clear()


def test_activations_that_are_no_numbers_stay_so(rows: Emulated):
    gen = torch.Generator().manual_seed(1)
    weight, _ = drawn("int8", 32, 256, gen)
    shape = stream_row.shape_of("int8", 32, 256, False, 2, ROOM)
    for strange in (float("nan"), float("inf")):
        x, out = torch.zeros(1, 256, dtype=torch.bfloat16), torch.zeros(1, 32)
        x[0, 7] = strange
        parameters = stream_row.parameters_of(x, weight, Scratch("cpu"), out, shape, None, None, None, None, 0.0, None)
        rows(stream_row.kernel_of("int8", min(5, shape.slots))[0], (shape.blocks, 1), stream_row.WARPS * 32, shape.shared_bytes, parameters)
        assert not out.isfinite().any()


@pytest.mark.parametrize(("G", "H"), [(1, 64), (3, 64), (4, 128)])
def test_one_query(queries: Emulated, G: int, H: int):
    gen, draw = torch.Generator().manual_seed(G * H), random.Random(G)
    K, P, context = 2, 16, 512
    for length, window, cap, turns in ((1, None, None, True), (16, None, None, False), (129, None, 30.0, True), (300, 64, None, True), (512, None, None, True)):
        mixer = Attention(N=G * K, K=K, H=H, rope=Rope(theta=10000.0, dims=H) if turns else None, window=window, logit_softcap=cap)
        planes = Planes(
            keys=torch.randn(context + 5 * P, K, H, generator=gen).bfloat16(),
            values=torch.randn(context + 5 * P, K, H, generator=gen).bfloat16(),
            store="bf16",
            block_size=P,
        )
        blocks = list(range(len(planes.keys) // P))
        draw.shuffle(blocks)
        table_1M = torch.tensor([blocks[: context // P]], dtype=torch.int32)
        turn = torch.randn(context, H // 2, 2, generator=gen) if turns else None
        qkv = torch.randn(1, (G * K + 2 * K) * H, generator=gen).bfloat16()
        at = [blocks[position // P] * P + position % P for position in range(length)]
        slot, before = torch.tensor([at[-1]]), (planes.keys.clone(), planes.values.clone())
        out = torch.full((1, G * K, H), float("nan"), dtype=torch.bfloat16)
        lengths, positions = torch.tensor([length], dtype=torch.int32), torch.tensor([length - 1])
        parameters = one_query.parameters_of(qkv, turn, positions, slot, planes, table_1M, lengths, mixer, out, context, early=True)
        shared = one_query.shared_bytes(mixer, context)
        queries(one_query.kernel_of(mixer)[0], (one_query.RANKS, K), one_query.THREADS, shared, parameters, ranks=one_query.RANKS)

        def turned(x: torch.Tensor, turn: torch.Tensor | None = turn, last: int = length - 1) -> torch.Tensor:
            if turn is None:
                return x
            (cos, sin), (a, b) = turn[last].unbind(1), x.float().chunk(2, 1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), 1).bfloat16()

        q, k, v = qkv[0].split([G * K * H, K * H, K * H])
        q, k, v = turned(q.view(-1, H)), turned(k.view(-1, H)), v.view(-1, H)
        torch.testing.assert_close(planes.keys[at[-1]].float(), k.float(), rtol=0.008, atol=1e-3)
        assert torch.equal(planes.values[at[-1]], v)
        before[0][at[-1]], before[1][at[-1]] = planes.keys[at[-1]], planes.values[at[-1]]
        assert torch.equal(planes.keys, before[0]) and torch.equal(planes.values, before[1]), "nothing else is written"
        seen = at[-window:] if window else at
        keys, values = planes.keys[seen].double(), planes.values[seen].double()
        scores = torch.einsum("kgh,tkh->kgt", q.double().view(K, G, H), keys) * mixer.softmax_scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        expected = torch.einsum("kgt,tkh->kgh", scores.softmax(-1), values).reshape(1, -1, H)
        torch.testing.assert_close(out.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("source", [stream_row.SOURCE, one_query.SOURCE], ids=lambda path: path.stem)
def test_a_kernel_has_no_ptx_of_its_own(source: Path):
    """The emulator stands in for the primitives alone, and for all of them."""
    assert "asm" not in source.read_text(encoding="utf-8")
    named = set(re.findall(r"^__device__ __forceinline__ \w+ (\w+)\(", PRIMITIVES.read_text(encoding="utf-8"), re.M))
    emulated = set(re.findall(r"^inline [\w*]+ (\w+)\(", EMULATOR.read_text(encoding="utf-8"), re.M))
    assert len(named) > 20 and named <= emulated, f"not emulated: {sorted(named - emulated)}"
