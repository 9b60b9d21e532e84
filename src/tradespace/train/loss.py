"""Next-token cross entropy without B·T·V logits: head and loss for `loss_tokens` tokens at a time, gradients in the same pass.

Held beside the hidden states: one chunk of logits in fp32 and its gradient (8·chunk·V bytes), the gradient of the hidden states and, where the head is trained,
its own. Cost: nothing is computed twice. The idea is Cut Cross-Entropy's (arXiv:2411.09009), over chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tradespace.adapt.frozen import transposed_product
from tradespace.errors import UnsupportedError
from tradespace.formats import CudaWeight, DenseWeight, NativeWeight, QuantizedWeight
from tradespace.model.transformer import Transformer
from tradespace.train.data import IGNORED

Coded = QuantizedWeight | CudaWeight
# (logits_CV fp32, the chunk's rows) → (summed loss, gradient of the logits by it, written over them where that saves a copy)
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class CrossEntropy:
    """Minus the log-probability of each target, summed; IGNORED ones count nothing."""

    def __init__(self, targets_T: Tensor):
        self.targets_T = targets_T

    def __call__(self, logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        targets_C = self.targets_T[rows]
        seen_C = targets_C != IGNORED
        picked_C1 = targets_C.clamp(min=0)[:, None]
        logsum_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
        loss = ((logsum_C1 - logits_CV.gather(1, picked_C1))[:, 0] * seen_C).sum()
        gradient_CV = logits_CV.sub_(logsum_C1).exp_()
        gradient_CV.scatter_add_(1, picked_C1, torch.full_like(logsum_C1, -1.0))
        return loss, gradient_CV.mul_(seen_C[:, None])

    def in_place(self, logits_CV: Tensor, rows: slice, scale: float) -> Tensor:
        """Of 16-bit logits on a device: the summed loss; the logits become their gradient, scaled."""
        from tradespace.kernels.loss.triton_cross_entropy import cross_entropy_

        return cross_entropy_(logits_CV, self.targets_T[rows], scale=scale, ignored=IGNORED).sum()


def cross_entropy(targets_T: Tensor) -> ChunkLoss:
    """The plain loss."""
    return CrossEntropy(targets_T)


def chunked_loss(model: Transformer, hidden_TD: Tensor, chunk_loss: ChunkLoss, *, scale: float, chunk: int) -> Tensor:
    """`scale` · Σ loss over all tokens, a scalar in fp32; hidden_TD is `model.forward`'s result. Backward of it is one product with the outer gradient."""
    normed_TD = hidden_TD if model.final_norm is None else model.final_norm(hidden_TD)
    head = model.embed if model.lm_head is None else model.lm_head
    if isinstance(head, NativeWeight):
        raise UnsupportedError("a head that is packed for the native kernels passes no gradient on. Plan with --attention sdpa")
    learned = (head.weight, head.bias) if isinstance(head, DenseWeight) else (None, None)
    return _Chunked.apply(normed_TD, *learned, head, chunk_loss, model.spec.logit_scale, model.spec.logit_softcap, scale, chunk)  # pyright: ignore[reportReturnType]


class _Chunked(torch.autograd.Function):
    """`weight_VD` and `bias_V` are those of a `head` of floats, which may learn; one in codes is decoded for the logits and again for their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor | None,
        bias_V: Tensor | None,
        head: DenseWeight | Coded,
        chunk_loss: ChunkLoss,
        logit_scale: float,
        softcap: float | None,
        scale: float,
        chunk: int,
    ) -> Tensor:
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dx_TD = torch.empty_like(x_TD) if wants_x else None
        dweight_VD = torch.zeros_like(weight_VD, memory_format=torch.contiguous_format) if wants_weight and weight_VD is not None else None
        dtype = weight_VD.dtype if weight_VD is not None else head.dtype if isinstance(head, QuantizedWeight) else torch.bfloat16
        dbias_V = torch.zeros_like(bias_V) if wants_bias and bias_V is not None else None
        total = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        plain = x_TD.is_cuda and isinstance(chunk_loss, CrossEntropy) and softcap is None and logit_scale == 1.0
        for start in range(0, len(x_TD), chunk):
            rows = slice(start, min(start + chunk, len(x_TD)))
            x_CD = x_TD[rows].to(dtype)
            logits_CV = head.linear(x_CD.detach(), head.bias) if weight_VD is None else torch.nn.functional.linear(x_CD, weight_VD, bias_V)
            if plain:
                assert isinstance(chunk_loss, CrossEntropy)
                total += chunk_loss.in_place(logits_CV, rows, scale)
                _collect(logits_CV, x_CD, head, None if dx_TD is None else dx_TD[rows], dweight_VD, dbias_V)
                del logits_CV  # before the next chunk's are made
                continue
            logits_CV = logits_CV.float()
            if logit_scale != 1.0:
                logits_CV *= logit_scale
            bent_CV = None
            if softcap is not None:
                bent_CV = torch.tanh(logits_CV / softcap)
                logits_CV = bent_CV * softcap
            loss, gradient_CV = chunk_loss(logits_CV, rows)
            total += loss
            if bent_CV is not None:
                gradient_CV.mul_(1 - bent_CV.square())
            gradient_CV = gradient_CV.mul_(logit_scale * scale).to(dtype)
            _collect(gradient_CV, x_CD, head, None if dx_TD is None else dx_TD[rows], dweight_VD, dbias_V)
            del logits_CV, gradient_CV, bent_CV
        ctx.gradients = (dx_TD, dweight_VD, dbias_V)
        return total * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients, None
        outer = gradients[0]
        if outer.device.type != "cpu" or float(outer) != 1.0:  # a device is not asked: that would wait for it
            found = tuple(None if each is None else each.mul_(outer.to(each.dtype)) for each in found)
        return (*found, None, None, None, None, None, None)


def _collect(gradient_CV: Tensor, x_CD: Tensor, head: DenseWeight | Coded, dx_CD: Tensor | None, dweight_VD: Tensor | None, dbias_V: Tensor | None) -> None:
    """What a chunk's gradient adds to the three others."""
    if dx_CD is not None and isinstance(head, DenseWeight) and dx_CD.dtype == gradient_CV.dtype:
        torch.mm(gradient_CV, head.weight, out=dx_CD)
    elif dx_CD is not None:
        dx_CD.copy_(gradient_CV @ head.weight if isinstance(head, DenseWeight) else transposed_product(head, gradient_CV))
    if dweight_VD is not None:
        dweight_VD.addmm_(gradient_CV.T, x_CD)
    if dbias_V is not None:
        dbias_V += gradient_CV.sum(dim=0)
