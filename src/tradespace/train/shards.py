"""What a rank holds of a model that trains on several: filled from whole tensors, updated as plain tensors, saved by rank, and put together again.

Data parallel by FSDP2 (`torch.distributed.fsdp.fully_shard`): every matrix lies in rows over the data ranks; a layer is gathered when it runs and its gradients
are summed into the parts. Norms (fp32, tiny) stay whole, and their gradients are summed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from tradespace.model.transformer import Transformer
from tradespace.spec.model import ModelSpec
from tradespace.spec.parallel import is_sharded, rows_of, tensor_part
from tradespace.spec.tensors import TensorSpec, model_tensors
from tradespace.train.ranks import ALONE, Ranks, settle

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Settled:
    """A collective after which gloo holds nothing. FSDP goes on as soon as the result is there; gloo's thread may then hold a layer's buffers for as long as it
    waits for a core or for the interpreter's lock, and what a step holds at its peak would be a matter of luck."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def wait(self, work: dist.Work | None) -> None:
        assert work is not None, "it was asked to run on"
        work.wait()
        settle()  # and what `work` held is free when this thread leaves it here


class SettledGather(Settled):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        self.wait(_of_torch("all_gather_single", "all_gather_into_tensor")(output_tensor, input_tensor, group=group, async_op=True))


class SettledReduce(Settled):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False) -> None:
        self.wait(_of_torch("reduce_scatter_single", "reduce_scatter_tensor")(output_tensor, input_tensor, op=op, group=group, async_op=True))


def _of_torch(name: str, before: str) -> Callable[..., dist.Work | None]:
    """A collective by its name, or the one that it had before torch 2.13."""
    return getattr(dist, name, None) or getattr(dist, before)


@dataclass
class Shards:
    """The parts of one rank. `spec` is the whole model's; names are those of `model_tensors(spec)`, wherever wrappers have put the tensors."""

    spec: ModelSpec
    ranks: Ranks = ALONE
    parameters: dict[str, Tensor] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        return self.ranks.world == 1

    def apply(self, model: Transformer) -> None:
        """Cuts `model`, which was built as this tensor rank's part and without memory for its parameters where there are several data ranks."""
        # torch's parts for this are imported where they are needed: they take a second and 40 MiB
        if self.ranks.tensor > 1:
            from tradespace.train.tensor_parallel import cut_products

            cut_products(model, self.ranks)
        if self.ranks.data > 1:
            from torch.distributed.fsdp import fully_shard

            mesh = self.ranks.along("data")
            whole = {parameter for name, parameter in model.named_parameters() if (tensor := self._tensor(name)) is None or not is_sharded(tensor.role)}
            for module in (*model.layers, model):
                sharded: Any = fully_shard(module, mesh=mesh, ignored_params=whole)
                if dist.get_backend(mesh.get_group()) == "gloo":
                    sharded.set_custom_all_gather(SettledGather())
                    sharded.set_custom_reduce_scatter(SettledReduce())

    def find(self, model: Transformer) -> dict[str, Tensor]:
        """The parameters by their plain names."""
        return {_plain(name): parameter for name, parameter in model.named_parameters()}

    def _tensor(self, name: str) -> TensorSpec | None:
        """None: an adapter's, which every rank holds whole."""
        return _by_name(self.spec).get(_plain(name))

    def _cut(self, name: str, rank: int) -> tuple[int, tuple[range, ...]] | None:
        tensor = self._tensor(name)
        return None if tensor is None else tensor_part(self.spec, tensor, rank, self.ranks.tensor)

    @torch.no_grad()
    def put(self, parameter: Tensor, name: str, whole: Tensor) -> None:
        """This rank's part of a whole tensor, into `parameter`."""
        ranks = self.ranks
        cut = self._cut(name, ranks.tensor_rank)
        if cut is not None:
            dim, parts = cut
            whole = torch.cat([whole.narrow(dim, part.start, len(part)) for part in parts], dim=dim)
        if in_parts(parameter):
            rows = rows_of(len(whole), ranks.data_rank, ranks.data)
            parameter.to_local().copy_(whole[rows.start : rows.stop])
        else:
            parameter.copy_(whole)

    def local(self, parameters: Mapping[str, Tensor], *, fused: bool = False) -> dict[str, Tensor]:
        """The same parameters as this rank's own plain tensors, with gradients beside them that a backward pass adds to; with a fused step none."""
        self.parameters = {_plain(name): parameter for name, parameter in parameters.items()}
        if fused:
            return dict(self.parameters)
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            parameter.grad = torch.zeros_like(parameter)
            if in_parts(parameter):
                held = parameter.to_local().detach()
                held.grad = _part(parameter.grad)
                found[name] = held
            else:
                found[name] = parameter
        return found

    @torch.no_grad()
    def collect(self, local: Mapping[str, Tensor]) -> None:
        """After a step's backward passes: gradients of what every data rank holds whole are summed, and those of parts are seen."""
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, "buffers are there from the start"
            if in_parts(parameter):
                local[name].grad = _part(parameter.grad)
            elif self.ranks.data > 1:
                self.ranks.sum_tensors([parameter.grad], "data")
                parameter.grad.div_(self.ranks.data)  # averaged, as FSDP does with parts

    def norm(self, local: Mapping[str, Tensor]) -> float:
        """Of all gradients together, each number counted once."""
        squares = {(in_data, in_tensor): 0.0 for in_data in (False, True) for in_tensor in (False, True)}
        for name, held in local.items():
            assert held.grad is not None, "buffers are there from the start"
            key = (in_parts(self.parameters[name]), self._cut(name, 0) is not None)
            squares[key] += float(held.grad.float().square().sum(dtype=torch.float64))
        total = 0.0
        for (in_data, in_tensor), value in squares.items():
            value = self.ranks.sum(value, "data") if in_data else value
            total += self.ranks.sum(value, "tensor") if in_tensor else value
        return math.sqrt(total)

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """A tensor of the whole model, in host memory. Every rank must ask."""
        parameter, ranks = self.parameters[name], self.ranks
        held = (parameter.full_tensor() if in_parts(parameter) else parameter).detach()
        cut, tensor = self._cut(name, 0), self._tensor(name)
        if cut is None or tensor is None:
            return held.cpu()
        parts = [torch.empty_like(held) for _ in range(ranks.tensor)]
        dist.all_gather(parts, held.contiguous(), group=ranks.along("tensor").get_group())
        dim = cut[0]
        found = torch.empty(tensor.shape, dtype=held.dtype)
        for rank, part in enumerate(parts):
            _, ranges = self._cut(name, rank) or (0, ())
            start = 0
            for place in ranges:
                found.narrow(dim, place.start, len(place)).copy_(part.narrow(dim, start, len(place)))
                start += len(place)
        return found


def _plain(name: str) -> str:
    """Without what wrappers add."""
    return name.replace(".base.", ".")


def in_parts(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether FSDP holds it as this rank's rows."""
    return hasattr(tensor, "to_local")


def _part(gradient: Tensor | None) -> Tensor:
    assert gradient is not None and in_parts(gradient), "FSDP keeps gradients in parts"
    return gradient.to_local()


_names: dict[ModelSpec, dict[str, TensorSpec]] = {}


def _by_name(spec: ModelSpec) -> dict[str, TensorSpec]:
    if spec not in _names:
        _names.clear()
        _names[spec] = {tensor.name: tensor for tensor in model_tensors(spec)}
    return _names[spec]
