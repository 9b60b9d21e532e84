"""What the CUDA products of few rows share: room for partial sums. Bytes: `spec.cuda.scratch_bytes`."""

from __future__ import annotations

import torch

from tradespace.spec.cuda import COUNTERS, PARTIALS


class Scratch:
    """Partial sums and counters of split products, one for all that run one after the other. Counters are zero between products."""

    def __init__(self, device: torch.device | str):
        self.partial = torch.zeros(PARTIALS, dtype=torch.float32, device=device)
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.partial.nbytes + self.counters.nbytes
