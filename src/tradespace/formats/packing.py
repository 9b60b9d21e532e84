"""Codes of 2, 3 or 4 bits as a stream of bits, row by row: code i takes bits i·b … i·b + b - 1, counted from the lowest bit of the row's first byte.

A row of C codes takes ceil(C · b / 8) bytes, the unused bits of the last one zero. For 4 and 2 bits no code straddles a byte; 3 bits go eight to three bytes.
Packed 32-bit words of compressed-tensors (4 and 2 bits) are the same stream, read as little-endian bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits → uint8 [R, ceil(C · bits / 8)]."""
    rows, columns = codes_RC.shape
    if bits == 3:
        eights_RN8 = F.pad(codes_RC, (0, -columns % 8)).view(rows, -(-columns // 8), 8).int()
        words_RN = torch.zeros(eights_RN8.shape[:2], dtype=torch.int32, device=codes_RC.device)
        for index in range(8):
            words_RN |= eights_RN8[:, :, index] << (3 * index)
        packed_RB = torch.stack([(words_RN >> shift) & 255 for shift in (0, 8, 16)], dim=2).to(torch.uint8).flatten(1)
        return packed_RB[:, : -(-columns * 3 // 8)]
    per_byte = 8 // bits
    parts_RNP = F.pad(codes_RC, (0, -columns % per_byte)).view(rows, -(-columns // per_byte), per_byte)
    packed_RN = parts_RNP[:, :, 0].clone()
    for index in range(1, per_byte):
        packed_RN |= parts_RNP[:, :, index] << (bits * index)
    return packed_RN


def unpack(packed_RB: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse: uint8 [R, columns]."""
    rows = len(packed_RB)
    if bits == 3:
        threes_RN3 = F.pad(packed_RB, (0, -packed_RB.shape[1] % 3)).view(rows, -(-packed_RB.shape[1] // 3), 3).int()
        words_RN = threes_RN3[:, :, 0] | (threes_RN3[:, :, 1] << 8) | (threes_RN3[:, :, 2] << 16)
        codes_RN8 = torch.empty((*words_RN.shape, 8), dtype=torch.uint8, device=packed_RB.device)
        for index in range(8):
            codes_RN8[:, :, index] = (words_RN >> (3 * index)) & 7
        return codes_RN8.flatten(1)[:, :columns]
    per_byte = 8 // bits
    codes_RNP = torch.empty((rows, packed_RB.shape[1], per_byte), dtype=torch.uint8, device=packed_RB.device)
    for index in range(per_byte):
        codes_RNP[:, :, index] = (packed_RB >> (bits * index)).bitwise_and_(2**bits - 1)
    return codes_RNP.flatten(1)[:, :columns]
