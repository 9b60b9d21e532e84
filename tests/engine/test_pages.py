"""Tensors in shared mappings: apart, aligned, zero, and gone when the last of them is."""

import gc
import sys
import weakref
from itertools import pairwise

import pytest
import torch

from tradespace.kernels import pages
from tradespace.kernels.pages import ALIGNMENT, CHUNK_BYTES, huge_zeros

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="plain tensors elsewhere")


def _range(tensor):
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def test_tensors_lie_apart_and_are_zero():
    shapes = [(1,), (3, 5), (1000, 7), (CHUNK_BYTES // 8,), (CHUNK_BYTES // 2 + 1,), (2,), (0, 4)]
    tensors = [huge_zeros(shape, dtype, purpose="test") for shape in shapes for dtype in (torch.uint8, torch.float16)]
    for value, tensor in enumerate(tensors):
        assert not tensor.any()
        tensor.fill_(value + 1)
    for value, tensor in enumerate(tensors):
        assert (tensor == value + 1).all()
        assert tensor.numel() == 0 or tensor.data_ptr() % ALIGNMENT == 0
    held = sorted((_range(tensor) for tensor in tensors if tensor.numel()), key=lambda found: found.start)
    assert all(before.stop <= after.start for before, after in pairwise(held))


def test_small_tensors_share_a_mapping_which_ends_with_them():
    first, second = (huge_zeros((100,), torch.uint8, purpose="ending") for _ in range(2))
    mapping = pages._chunks["ending"][0]
    assert isinstance(mapping, weakref.ref)
    assert mapping() is not None
    assert abs(first.data_ptr() - second.data_ptr()) < 4096
    del first
    gc.collect()
    assert mapping() is not None
    second.fill_(1)
    del second
    gc.collect()
    assert mapping() is None
    assert not huge_zeros((100,), torch.uint8, purpose="ending").any()


def test_purposes_do_not_share():
    a, b = huge_zeros((64,), torch.uint8, purpose="one"), huge_zeros((64,), torch.uint8, purpose="another")
    assert abs(a.data_ptr() - b.data_ptr()) >= CHUNK_BYTES // 2
