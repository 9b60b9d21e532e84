"""A token from each row of logits: the best, or a draw from what temperature, top-k, top-p and min-p leave. `reference.py` is the specification, `noise.py`
where chance comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Shape(Protocol):
    """How a distribution is bent before a token is drawn from it. temperature 0: the best token; top_k below 1, top_p 1, min_p 0: off."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...


class SampleKernel(Protocol):
    """What computes it. A row's token is None where its largest logit is no finite number, and depends on nothing but the row, its shape and its key."""

    name: str

    def workspace_bytes(self, vocab_size: int) -> int:
        """Most bytes that it holds beside the logits, whatever the number of rows."""
        ...

    def best(self, logits_RV: Tensor) -> list[int | None]:
        """The first index of each row's largest logit. fp32; rows may lie any distance apart."""
        ...

    def draw(self, logits_RV: Tensor, rows: Sequence[int], shapes: Sequence[Shape], keys: Sequence[int]) -> list[int | None]:
        """A token from each of these rows of the matrix, which stays as it is; `keys` are those of `noise.noise_key`, unused where the best is asked for."""
        ...


__all__ = ["SampleKernel", "Shape"]
