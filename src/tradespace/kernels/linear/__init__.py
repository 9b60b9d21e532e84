"""The dense product. `Plan.linear` names the kernel, and norms and activations go with it. `reference.py` is the specification."""

from collections.abc import Callable

from torch import Tensor

from tradespace.kernels.linear import reference, torch

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

LINEAR: dict[str, Linear] = {"torch": torch.linear, "reference": reference.linear}
