"""SnapKV: what the last `window` tokens of a prompt attend to is what stays, averaged over 5 neighbours so that whole phrases do. arXiv:2404.14469

Chosen at the end of each chunk of a prompt. While decoding, scores stand still: each new token takes the place of the prompt's weakest, and once none of the
prompt is left but the protected, of the oldest generated one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from tradespace.spec.kv_retain import SNAP_NEIGHBOURS, Retain

GENERATED = 2.0**20  # above any score of a prompt's token; a position added to it is still exact in fp32


class SnapKV:
    def __init__(self, retain: Retain):
        self.budget, self.protected = retain.budget, retain.protected

    def kept(self, length: int) -> int:
        return min(length, self.budget)

    def weigh_last(self, num_queries: int) -> int:
        """The observation window of a chunk; nothing while decoding."""
        return min(num_queries, self.protected) if num_queries > 1 else 0

    def score(self, old_KS: Tensor, weights_KS: Tensor | None, positions_KS: Tensor, num_queries: int) -> Tensor:
        if weights_KS is None:
            own_KT = GENERATED + positions_KS[:, -num_queries:].float()
            return torch.cat((old_KS[:, :-num_queries], own_KT), dim=1)
        # neighbours in the text, not in memory
        order_KS = positions_KS.argsort(dim=1)
        pooled_KS = avg_pool1d(weights_KS.gather(1, order_KS)[:, None], SNAP_NEIGHBOURS, stride=1, padding=SNAP_NEIGHBOURS // 2)[:, 0]
        return torch.empty_like(pooled_KS).scatter_(1, order_KS, pooled_KS)
