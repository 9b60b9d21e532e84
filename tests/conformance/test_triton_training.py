"""The kernels of a training step on the device, forward and backward, against the library's and autograd's. Under Triton's interpreter here."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from tradespace.adapt.frozen import transposed_product
from tradespace.formats import build_weight
from tradespace.formats.workspace import Workspace
from tradespace.kernels.activation.torch import SwiGLU
from tradespace.kernels.norm import torch as norms
from tradespace.kernels.rope.rotate import RopeRows, rotate
from tradespace.quantize.rtn import fill_rtn

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter (conftest.py sets TRITON_INTERPRET=1)")
torch.set_num_threads(1)

from tradespace.formats.cuda import CudaWeight  # noqa: E402
from tradespace.kernels.activation.triton_swiglu import swiglu  # noqa: E402
from tradespace.kernels.loss.triton_cross_entropy import cross_entropy_  # noqa: E402
from tradespace.kernels.norm.triton_rms_backward import rms_backward  # noqa: E402
from tradespace.kernels.rope.triton_rotate import Rotation  # noqa: E402

CLOSE = {torch.float32: {"atol": 2e-6, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@settings(max_examples=8, deadline=None)
@given(T=st.integers(0, 9), D=st.integers(1, 130))
def test_backward_of_the_norm(dtype, T, D):
    x, dout, weight = _drawn(T, D, dtype=dtype), _drawn(T, D, dtype=dtype, seed=1), _drawn(D, seed=2)
    dx, dweight = rms_backward(x, weight, dout, 1e-5, weight_too=True)
    want_x, want_weight = norms.rms_backward(x.clone(), weight, dout, 1e-5, weight_too=True)
    torch.testing.assert_close(dx, want_x, **CLOSE[dtype])
    torch.testing.assert_close(dweight, want_weight, atol=1e-5, rtol=1e-5)
    assert rms_backward(x, weight, dout, 1e-5, weight_too=False)[1] is None


@DTYPES
@pytest.mark.parametrize("F", [1, 96, 1500])
def test_swiglu_both_ways(dtype, F):
    x, dout = _drawn(5, 2 * F, dtype=dtype).requires_grad_(), _drawn(5, F, dtype=dtype, seed=1)
    want = SwiGLU.apply(x)
    want.backward(dout)
    torch.testing.assert_close(swiglu(x.detach()), want.detach(), **CLOSE[dtype])
    torch.testing.assert_close(swiglu(x.detach(), dout), x.grad, **CLOSE[dtype])


@pytest.mark.parametrize(("H", "dims"), [(16, 16), (24, 12), (64, 64)])
def test_rotation_both_ways(H, dims):
    """Of heads that lie in a wider product, whole and in part."""
    wide, angles = _drawn(6, 5 * H + 7).requires_grad_(), [_drawn(6, 1, dims, seed=seed) for seed in (1, 2)]
    other = wide.detach().clone().requires_grad_()
    dout = _drawn(6, 4, H, seed=3)
    want = rotate(wide[:, : 4 * H].unflatten(1, (4, H)), RopeRows(*angles, False))
    found = Rotation.apply(other[:, : 4 * H].unflatten(1, (4, H)), *angles)
    want.backward(dout)
    found.backward(dout)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other.grad, wide.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("V", [3, 1000, 9001])
def test_cross_entropy_in_place(V):
    logits, targets = (8 * _drawn(6, V)).requires_grad_(), torch.tensor([1, 2, -100, V - 1, 0, V // 2])
    want = cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    (0.5 * want.sum()).backward()
    held = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_(held, targets, scale=0.5, ignored=-100), want.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(held, logits.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fmt", ["nf4", "int4-g64", "int8"])
@pytest.mark.parametrize("room", [64 * 96, 2**20])
def test_gradients_pass_through_packed_codes(fmt, room):
    """In one tile and in several: dx = dy @ W of the same codes as the format's own layout holds."""
    rows, columns = 224, 96
    plain = build_weight(fmt, (rows, columns), dense=torch.bfloat16, workspace=Workspace(rows * columns, rows, torch.bfloat16))
    fill_rtn(plain, 0, _drawn(rows, columns), name="w")
    packed = CudaWeight(fmt, (rows, columns), device="cpu", workspace=Workspace(room, rows, torch.bfloat16))
    packed.set_rows(slice(0, rows), plain.get_rows(0, rows))
    dy = _drawn(5, rows, dtype=torch.bfloat16, seed=1)
    want = dy.float() @ plain.dense_rows(0, rows).float()
    found = transposed_product(packed, dy).float()
    assert (found - want).norm() / want.norm() < 1e-2


def test_a_packed_head_gives_the_loss_and_gradient_of_what_it_stands_for():
    """Embedding and head of a QLoRA base in int8: the loss through CudaWeight, its last chunk of few rows included, beside the same as floats."""
    from tradespace.build_training import build_model
    from tradespace.spec.training import qlora_weights
    from tradespace.spec.weights import TRAINING_LAYOUT, WeightPlan
    from tradespace.train.loss import chunked_loss
    from tradespace.train.loss import cross_entropy as summed
    from train.small import V, small_spec

    spec = small_spec(L=1, tied=False)
    model = build_model(spec, qlora_weights("nf4", "int8", TRAINING_LAYOUT), context=64)
    dense = build_model(spec, WeightPlan(default="bf16"), context=64)
    for name in ("embed", "lm_head"):
        packed, plain = model.get_submodule(name), dense.get_submodule(name)
        assert isinstance(packed, CudaWeight)
        fill_rtn(packed, 0, _drawn(V, 64, seed=4) * 0.3, name=name)
        plain.weight.data.copy_(packed.dense_rows(0, V))  # type: ignore[union-attr]
    ids_T, targets_T = torch.arange(70) % V, torch.arange(1, 71) % V
    torch.testing.assert_close(model.embed.rows(ids_T), dense.embed.rows(ids_T))
    found = []
    for held in (model, dense):
        held.get_parameter("final_norm.weight").data.fill_(1.0)
        x_TD = _drawn(70, 64, dtype=torch.bfloat16, seed=5).requires_grad_()
        loss = chunked_loss(held, x_TD, summed(targets_T), scale=0.02, chunk=66)
        loss.backward()
        assert x_TD.grad is not None
        found.append((float(loss.detach()), x_TD.grad.float()))
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-3)
    assert (found[0][1] - found[1][1]).norm() / found[1][1].norm() < 2e-2


@pytest.mark.parametrize(("dtype", "shape"), [(torch.bfloat16, (33, 70)), (torch.bfloat16, (5,)), (torch.float32, (2049,)), (torch.float16, (0, 4))])
def test_adamw_in_one_kernel_is_adamw(dtype, shape):
    """Three steps beside torch's own fused step in fp64: moments, master and the 16-bit parameter."""
    from tradespace.kernels.optimizer.triton_adamw import adamw

    gen = torch.Generator().manual_seed(4)
    parameter = torch.randn(shape, generator=gen).to(dtype)
    master = parameter.float() if dtype != torch.float32 else None
    m, v = torch.zeros(shape), torch.zeros(shape)
    held, wide_m, wide_v = parameter.double(), torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for number in range(1, 4):
        gradient = torch.randn(shape, generator=gen).to(dtype)
        adamw(parameter, master, gradient, m, v, lr=0.01, betas=(0.9, 0.95), eps=1e-8, decay=0.1, number=number)
        torch._fused_adamw_(
            [held], [gradient.double()], [wide_m], [wide_v], [], [torch.tensor(float(number))],
            amsgrad=False, lr=0.01, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip
    for found, expected in ((m, wide_m), (v, wide_v), (parameter if master is None else master, held)):
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-7)
    if master is not None:
        torch.testing.assert_close(parameter.float(), master, rtol=2**-7, atol=0.0)  # the interpreter cuts where a device rounds


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 5000), (torch.float32, 4096), (torch.float32, 1)])
def test_adamw_with_8_bit_moments_in_one_kernel(dtype, count):
    """Three steps beside the codes' own reading and writing around torch's fused step: codes, scales, master."""
    from tradespace.kernels.optimizer.triton_adamw8 import adamw8
    from tradespace.spec.training import BLOCK_8BIT
    from tradespace.train.coded import Coded, edges

    gen = torch.Generator().manual_seed(6)
    parameter = torch.randn(count, generator=gen).to(dtype)
    master = parameter.float() if dtype != torch.float32 else None
    held = parameter.float()
    blocks, cpu = -(-count // BLOCK_8BIT), torch.device("cpu")
    states = [
        [(torch.full((count,), Coded.zero(signed), dtype=torch.uint8), torch.zeros(blocks)) for signed in (True, False)] for _ in range(2)
    ]  # fmt: skip
    tables = (*edges(True, cpu), *edges(False, cpu))
    for number in range(1, 4):
        gradient = torch.randn(count, generator=gen).to(dtype)
        adamw8(parameter, master, gradient, *states[0], tables, block=BLOCK_8BIT, lr=0.01, betas=(0.9, 0.95), eps=1e-8, decay=0.1, number=number)
        coded = [Coded(*state, signed=signed) for state, signed in zip(states[1], (True, False), strict=True)]
        m, v = (each.read() for each in coded)
        torch._fused_adamw_(
            [held], [gradient.float()], [m], [v], [], [torch.tensor(float(number))],
            amsgrad=False, lr=0.01, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip
        coded[0].write(m)
        coded[1].write(v)
        for (codes, scales), (want_codes, want_scales) in zip(*states, strict=True):
            torch.testing.assert_close(scales, want_scales, rtol=1e-5, atol=0.0)
            apart = (codes.int() - want_codes.int()).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01, "a number on an edge between two levels may fall either way"
        torch.testing.assert_close(parameter if master is None else master, held, rtol=1e-3, atol=1e-4)


def test_documents_of_equal_length_attend_together_and_learn_the_same():
    """The device's way, runs of equal documents at once, against the CPU's, one by one: output and gradients."""
    from tradespace.kernels.attention.packed import attend_packed, attend_runs
    from tradespace.kernels.view import Span, StepBatch
    from tradespace.spec.mixers import Attention

    gen, lengths = torch.Generator().manual_seed(5), (6, 6, 6, 0, 9, 6, 1, 1)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    tables = torch.zeros(len(lengths), 0, dtype=torch.int32)
    spans = tuple(Span(start, length, length) for start, length in zip(starts, lengths, strict=True))
    mixer, T = Attention(N=4, K=2, H=8), sum(lengths)
    batch = StepBatch(torch.tensor([*starts, T], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), tables, torch.zeros(0, dtype=torch.int64), spans)
    drawn = [torch.randn(T, heads, 8, generator=gen) for heads in (4, 2, 2)]
    outcomes = []
    for attend in (lambda *x: attend_runs(*x, spans, mixer), lambda *x: attend_packed(*x, batch, mixer)):
        inputs = [x.clone().requires_grad_() for x in drawn]
        out = attend(*inputs)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        assert out.is_contiguous()
        outcomes.append([out, *(x.grad for x in inputs)])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
