"""Optimizers that update one parameter at a time, so that a step can be fused into the backward pass and a gradient forgotten at once.

A state is a dict of tensors beside its parameter: fp32 moments (AdamW, arXiv:1711.05101), 8-bit blockwise moments (arXiv:2110.02861), or a row and a column
(Adafactor, arXiv:1804.04235). Where a parameter is held in 16 bits its fp32 master is part of the state. Bytes: `spec.training.OPTIMIZERS`.

Paged optimizers (arXiv:2305.14314) hold their states in the host's memory, pinned, and move a parameter's to the device for its step and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tradespace.spec.training import BLOCK_8BIT, OPTIMIZERS, OptimizerSpec
from tradespace.train.coded import Coded, edges

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """`decay` is decoupled and spares vectors (norms, biases)."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0


class Optimizer:
    """States of all parameters, allocated and touched at once."""

    def __init__(self, name: str, parameters: Mapping[str, Tensor], hyper: Hyper):
        self.spec: OptimizerSpec = OPTIMIZERS[name]
        self.hyper = hyper
        arithmetic = self.spec.arithmetic
        self.update: Callable[[Tensor, Tensor, State, Hyper, float, int], None] = UPDATES[arithmetic]
        self.states: dict[str, State] = {}
        for key, parameter in parameters.items():
            state = START[arithmetic](torch.empty(parameter.shape, dtype=parameter.dtype) if self.spec.pages else parameter)
            if parameter.dtype != torch.float32 and arithmetic not in ("sgd", "adafactor"):
                master = parameter.detach()
                state["master"] = (master.cpu() if self.spec.pages else master).float()
            if self.spec.pages and parameter.is_cuda:
                state = {part: tensor.pin_memory() for part, tensor in state.items()}
            self.states[key] = state

    @property
    def nbytes(self) -> int:
        """Bytes of all states, wherever they are."""
        return sum(tensor.nbytes for state in self.states.values() for tensor in state.values())

    def settle(self) -> None:
        """Waits until paged states are back in the host's memory: before anyone reads them there."""
        if self.spec.pages and torch.cuda.is_available():
            torch.cuda.synchronize()

    @torch.no_grad()
    def step(self, key: str, parameter: Tensor, gradient: Tensor, *, lr: float, number: int) -> None:
        """Updates one parameter. `number` counts steps from 1."""
        held = self.states[key]
        state = {part: tensor.to(parameter.device, non_blocking=True) for part, tensor in held.items()} if self.spec.pages else held
        self._step(parameter, gradient, state, lr, number)
        if self.spec.pages:
            for part, tensor in state.items():
                if tensor is not held[part]:  # on a CPU it is the very same
                    held[part].copy_(tensor, non_blocking=True)

    def _step(self, parameter: Tensor, gradient: Tensor, state: State, lr: float, number: int) -> None:
        """The same with its state beside it."""
        master = state.get("master")
        held = parameter.data if master is None else master
        hyper = self.hyper if parameter.dim() > 1 else Hyper(**{**vars(self.hyper), "decay": 0.0})
        if parameter.is_cuda and ("m_codes" in state or (master is not None and "m" in state)):
            _adamw_in_one(parameter.data, gradient, state, hyper, lr, number)
            return
        self.update(held, gradient, state, hyper, lr, number)
        if master is not None:
            parameter.data.copy_(master)

    @torch.no_grad()
    def step_all(self, parameters: Mapping[str, Tensor], *, lr: float, number: int) -> None:
        """Updates all parameters from their gradients; AdamW's in two calls, since an adapter has hundreds of small ones."""
        if self.spec.name != "adamw":
            for key, parameter in parameters.items():
                assert parameter.grad is not None, "buffers are there from the start"
                self.step(key, parameter, parameter.grad, lr=lr, number=number)
            return
        groups: dict[bool, list[str]] = {}
        for key, parameter in parameters.items():
            if parameter.dtype == torch.float32:
                groups.setdefault(parameter.dim() > 1, []).append(key)
            else:  # 16-bit gradients are widened: one at a time
                assert parameter.grad is not None, "buffers are there from the start"
                self.step(key, parameter, parameter.grad, lr=lr, number=number)
        for decays, keys in groups.items():
            here = [parameters[key] for key in keys]
            slopes = [parameter.grad for parameter in here if parameter.grad is not None]
            hyper = self.hyper if decays else Hyper(**{**vars(self.hyper), "decay": 0.0})
            _adamw_all([parameter.data for parameter in here], slopes, [self.states[key] for key in keys], hyper, lr, number)


def _adamw_state(parameter: Tensor) -> State:
    shape = {"dtype": torch.float32, "device": parameter.device}
    return {"m": torch.zeros(parameter.shape, **shape), "v": torch.zeros(parameter.shape, **shape)}


def _adamw(held: Tensor, gradient: Tensor, state: State, hyper: Hyper, lr: float, number: int) -> None:
    _adamw_all([held], [gradient.to(held.dtype)], [state], hyper, lr, number)


def _adamw_all(held: list[Tensor], gradients: list[Tensor], states: list[State], hyper: Hyper, lr: float, number: int) -> None:
    step = torch.full((), float(number), device=held[0].device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        held, gradients, [state["m"] for state in states], [state["v"] for state in states], [], [step] * len(held),
        amsgrad=False, lr=lr, beta1=hyper.beta1, beta2=hyper.beta2, weight_decay=hyper.decay, eps=hyper.eps, maximize=False,
    )  # fmt: skip


def _adamw_in_one(parameter: Tensor, gradient: Tensor, state: State, hyper: Hyper, lr: float, number: int) -> None:
    """On a device, in one kernel: a 16-bit parameter with fp32 moments and master, or any with 8-bit moments."""
    from tradespace.kernels.optimizer.triton_adamw import adamw
    from tradespace.kernels.optimizer.triton_adamw8 import adamw8

    how = {"lr": lr, "betas": (hyper.beta1, hyper.beta2), "eps": hyper.eps, "decay": hyper.decay, "number": number}
    master = state.get("master")
    if "m" in state:
        adamw(parameter, master, gradient, state["m"], state["v"], **how)
        return
    tables = (*edges(True, parameter.device), *edges(False, parameter.device))
    m, v = ((state[f"{name}_codes"], state[f"{name}_scales"]) for name in ("m", "v"))
    adamw8(parameter, master, gradient, m, v, tables, block=BLOCK_8BIT, **how)


def _adamw8_state(parameter: Tensor) -> State:
    if prod(parameter.shape) < 4096:
        return _adamw_state(parameter)
    blocks, device = -(-parameter.numel() // BLOCK_8BIT), parameter.device
    found: State = {}
    for name, signed in (("m", True), ("v", False)):
        found[f"{name}_codes"] = torch.full((parameter.numel(),), Coded.zero(signed), dtype=torch.uint8, device=device)
        found[f"{name}_scales"] = torch.zeros(blocks, dtype=torch.float32, device=device)
    return found


# parameters whose moments are fp32 at once; a device, which starts some twenty kernels a tile, wants them larger
TILES = {"cpu": 1 << 20, "cuda": 1 << 22}


def _adamw8(held: Tensor, gradient: Tensor, state: State, hyper: Hyper, lr: float, number: int) -> None:
    if "m" in state:
        _adamw(held, gradient, state, hyper, lr, number)
        return
    flat, slope = held.view(-1), gradient.reshape(-1)
    tile = TILES[held.device.type]
    for start in range(0, len(flat), tile):
        part = slice(start, min(start + tile, len(flat)))
        blocks = slice(start // BLOCK_8BIT, -(-part.stop // BLOCK_8BIT))
        coded_m = Coded(state["m_codes"][part], state["m_scales"][blocks], signed=True)
        coded_v = Coded(state["v_codes"][part], state["v_scales"][blocks], signed=False)
        m, v = coded_m.read(), coded_v.read()
        _adamw(flat[part], slope[part], {"m": m, "v": v}, hyper, lr, number)
        coded_m.write(m)
        coded_v.write(v)


def _adafactor_state(parameter: Tensor) -> State:
    shape = {"dtype": torch.float32, "device": parameter.device}
    if parameter.dim() < 2:
        return {"v": torch.zeros(parameter.shape, **shape)}
    return {"rows": torch.zeros(parameter.shape[:-1], **shape), "columns": torch.zeros((*parameter.shape[:-2], parameter.shape[-1]), **shape)}


def _adafactor(held: Tensor, gradient: Tensor, state: State, hyper: Hyper, lr: float, number: int) -> None:
    """No first moment, no relative step; the update's root mean square is clipped to 1."""
    beta = 1 - number**-0.8
    slope = gradient.float()
    square = slope.square().add_(1e-30)
    if "v" in state:
        state["v"].lerp_(square, 1 - beta)
        update = slope * state["v"].rsqrt()
    else:
        state["rows"].lerp_(square.mean(dim=-1), 1 - beta)
        state["columns"].lerp_(square.mean(dim=-2), 1 - beta)
        rows = (state["rows"] / state["rows"].mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        update = square.copy_(slope).mul_(rows).mul_(state["columns"].rsqrt().unsqueeze(-2))
    update.div_((update.square().mean().sqrt()).clamp(min=1.0))
    if hyper.decay:
        held.mul_(1 - lr * hyper.decay)
    held.add_(update.to(held.dtype), alpha=-lr)


def _sgd(held: Tensor, gradient: Tensor, state: State, hyper: Hyper, lr: float, number: int) -> None:
    if hyper.decay:
        held.mul_(1 - lr * hyper.decay)
    held.add_(gradient.to(held.dtype), alpha=-lr)


START: dict[str, Callable[[Tensor], State]] = {
    "adamw": _adamw_state,
    "adamw8bit": _adamw8_state,
    "adafactor": _adafactor_state,
    "sgd": lambda parameter: {},
}
UPDATES: dict[str, Callable[[Tensor, Tensor, State, Hyper, float, int], None]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8,
    "adafactor": _adafactor,
    "sgd": _sgd,
}
