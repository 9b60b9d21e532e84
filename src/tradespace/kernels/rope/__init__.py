"""Rotary positions (arXiv:2104.09864): angles per position from `tables.py`, the rotation itself from `rotate.py`."""

from tradespace.kernels.rope.rotate import RopeRows, rotate
from tradespace.kernels.rope.tables import RopeTable, inverse_frequencies, rope_table_bytes

__all__ = ["RopeRows", "RopeTable", "inverse_frequencies", "rope_table_bytes", "rotate"]
