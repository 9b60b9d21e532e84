"""Softmax attention over a KVView: `reference` is the specification, `dispatch` says which kernel runs where."""

from tradespace.kernels.attention.dispatch import KERNELS, Attend, Choice, choose, make_kernels, resolve_kernels, supports
from tradespace.spec.attention_workspace import workspace_bytes

__all__ = ["KERNELS", "Attend", "Choice", "choose", "make_kernels", "resolve_kernels", "supports", "workspace_bytes"]
