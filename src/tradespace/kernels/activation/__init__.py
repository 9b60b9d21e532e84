"""What stands between the two products of a feed-forward: act(up), or act(gate) · up where gated (arXiv:2002.05202).

Both come from one fused product: `gate_up` holds the gate's columns first, then up's.
"""

from collections.abc import Callable

from torch import Tensor

from tradespace.kernels.activation import reference, torch

# (x_TF or gate_up_T2F, name of the function, gated) → hidden_TF
Activate = Callable[[Tensor, str, bool], Tensor]

ACTIVATIONS: dict[str, Activate] = {"torch": torch.activate, "reference": reference.activate}
# (logits, cap) → cap · tanh(logits / cap), Gemma 2's (arXiv:2408.00118)
SOFTCAPS: dict[str, Callable[[Tensor, float], Tensor]] = {"torch": torch.softcap, "reference": reference.softcap}
