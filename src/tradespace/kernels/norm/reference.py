"""Norms written out in fp32, row by row (`kernels/rows.py`). This is the specification."""

from torch import Tensor

from tradespace.kernels.rows import each_row


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    scaled = x * weight.float()
    return scaled if bias is None else scaled + bias.float()


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight (+ bias) over the last dimension; x is (T, …, width)."""
    return each_row(lambda row: _affine(row * (row.square().mean(-1, keepdim=True) + eps).rsqrt(), weight, bias), x.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight (+ bias) over the last dimension; x is (T, …, width)."""

    def norm(row: Tensor) -> Tensor:
        centred = row - row.mean(-1, keepdim=True)
        return _affine(centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt(), weight, bias)

    return each_row(norm, x.float()).to(x.dtype)
