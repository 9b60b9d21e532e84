"""Keys per channel: a channel's elements of `group` neighbouring tokens share a scale and a minimum, both fp16. arXiv:2402.02750

Outliers of keys stay in few channels; per token they would widen every group's range. bits + 1 an element for groups of 32 tokens. Only whole groups are coded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.kv.store.codec import zeros
from tradespace.kv.store.grouped import affine_codes, pack, unpack
from tradespace.spec.kv_workspace import DECODE_ROWS


@dataclass(frozen=True, slots=True)
class Channels:
    """Planes: packed codes (slots, heads, W·bits/8); scales and minima (slots / group, heads, 2·W)."""

    bits: int
    group: int

    def allocate(self, num_slots: int, heads: int, width: int, device: torch.device | str) -> tuple[Tensor, ...]:
        codes = zeros((num_slots, heads, width * self.bits // 8), torch.uint8, device)
        return codes, zeros((-(-num_slots // self.group), heads, 2 * width), torch.float16, device)

    def write_groups(self, planes: tuple[Tensor, ...], slots_T: Tensor, x_TKW: Tensor) -> None:
        """T tokens, whole groups, each in slots that follow one another from a multiple of `group` on."""
        T, K, W = x_TKW.shape
        codes_GCKW, scale_G1KW, low_G1KW = affine_codes(x_TKW.float().unflatten(0, (-1, self.group)), self.bits, 1)
        planes[0].index_copy_(0, slots_T, pack(codes_GCKW.reshape(T * K, W), self.bits).view(T, K, -1))
        planes[1].index_copy_(0, slots_T[:: self.group] // self.group, torch.cat((scale_G1KW[:, 0], low_G1KW[:, 0]), dim=-1))

    def read_into(self, planes: tuple[Tensor, ...], slots_S: Tensor, out_SKW: Tensor) -> None:
        """Decodes whole groups into `out`."""
        S, K, W = out_SKW.shape
        step = max(self.group, DECODE_ROWS // self.group * self.group)
        for start in range(0, S, step):
            slots = slots_S[start : start + step]
            codes_XW = unpack(planes[0].index_select(0, slots).reshape(len(slots) * K, -1), self.bits, W)
            scale_GKW, low_GKW = planes[1].index_select(0, slots[:: self.group] // self.group).float().chunk(2, dim=-1)
            x_GCKW = codes_XW.float().view(-1, self.group, K, W).mul_(scale_GKW[:, None]).add_(low_GKW[:, None])
            out_SKW[start : start + step] = x_GCKW.flatten(0, 1)
