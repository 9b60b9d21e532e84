"""Round to nearest: each group scaled by its own extremes and rounded. No data, one pass; the baseline that other quantizers must beat.

int8: scale = max|w| / 127, error at most scale / 2 per weight. Integer grids of 2 to 4 bits: grid.py; lattices: lattice.py; GGUF's blocks: ggml_blocks.py.
Floats are cast. A format whose scale spans rows (a whole matrix, or 128 rows) needs all of those at once, or `observe` on all of them first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.errors import EngineError, InputError
from tradespace.formats import DTYPES, FORMATS, CudaWeight, QuantizedWeight, ScaledWeight, Weight
from tradespace.formats.codes import Codes, group_extremes, spread
from tradespace.formats.nf4 import NF4Codec, levels
from tradespace.formats.scaled import ScaledCodec
from tradespace.quantize.ggml_blocks import encode_blocks
from tradespace.quantize.grid import affine_grid, encode_affine
from tradespace.quantize.lattice import encode_lattice
from tradespace.spec.formats import WeightFormat, find_format

# values that are encoded at once, and what an encoder takes beside them at most
TILE_ELEMENTS = 2**17
DEVICE_TILE_ELEMENTS = 2**21  # on a device, which starts some twenty kernels a tile
ENCODE_BYTES_PER_ELEMENT = 80


def round_to_nearest(name: str, values_RC: Tensor, *, search: bool = False) -> Codes:
    """Codes of format `name` for float values: whole rows, and for a scale that spans rows whole matrices. Raises InputError for what the format cannot hold.

    search  scales by least squared error instead of the largest magnitude, where the format leaves a choice: int2/3/4 and e8 (GGUF's K-quants always search)
    """
    fmt = find_format(name)
    codec = FORMATS[name].codec
    if codec is None:
        return Codes(values_RC.to(DTYPES[name]))
    if isinstance(codec, ScaledCodec):
        return _encode_scaled(values_RC, codec, _shared_scales(values_RC, codec))
    if isinstance(codec, NF4Codec):
        return _encode_nf4(values_RC, fmt)
    if fmt.block is None:
        return encode_affine(values_RC, fmt, *affine_grid(values_RC, fmt, search=search))
    return encode_blocks(values_RC, fmt) if fmt.group is None else encode_lattice(values_RC, fmt, search=search)


def _shared_scales(values_RC: Tensor, codec: ScaledCodec) -> Tensor:
    """scale_RG: max|w| / the largest code, over the rows and columns that share it; rows counted from the first of `values_RC`."""
    low_RG, high_RG = group_extremes(values_RC, codec.fmt.group or 0)
    scale_RG = torch.maximum(-low_RG, high_RG).float().div_(codec.largest)
    rows, span = len(scale_RG), codec.fmt.scale_rows or len(scale_RG)
    if span == 1 or not rows:
        return scale_RG
    blocks_BG = torch.nn.functional.pad(scale_RG, (0, 0, 0, -rows % span)).unflatten(0, (-1, span)).amax(dim=1)
    return blocks_BG.repeat_interleave(span, dim=0)[:rows]


def _encode_scaled(values_RC: Tensor, codec: ScaledCodec, scale_RG: Tensor) -> Codes:
    """int8 codes, ties to even, or fp8 ones as torch casts them, of values over their scales. Zeros have codes 0, and so has a row whose scale underflows."""
    divisor_RG = scale_RG.masked_fill(scale_RG == 0, 1.0)
    steps_RC = values_RC.float() / spread(divisor_RG, codec.fmt.group or 0, values_RC.shape[1])
    if codec.element == torch.int8:
        steps_RC.round_()
    return Codes(steps_RC.clamp_(-codec.largest, codec.largest).to(codec.element), scale_RG)


def _encode_nf4(values_RC: Tensor, fmt: WeightFormat) -> Codes:
    """The nearest of the 16 levels, bitwise as bitsandbytes finds it: times the scale's inverse, ties to the lower level. Scales stay plain here."""
    low_RG, high_RG = group_extremes(values_RC.float(), fmt.group or 0)
    scale_RG = torch.maximum(-low_RG, high_RG)
    inverse_RG = 1.0 / scale_RG.clamp(min=1e-38)
    unit_RC = (values_RC * spread(inverse_RG, fmt.group or 0, values_RC.shape[1])).clamp_(-1, 1)
    table = levels(values_RC.device)
    return Codes(torch.bucketize(unit_RC, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8), scale_RG)


def _magnitudes(values_RC: Tensor, name: str) -> Tensor:
    """max|w| of each row. Raises InputError for NaN and infinities, which `aminmax` lets through to here."""
    low_R, high_R = values_RC.aminmax(dim=1)
    found_R = torch.maximum(-low_R, high_R)
    if not found_R.isfinite().all():
        row = int((~found_R.isfinite()).nonzero()[0])
        raise InputError(f"tensor {name}: row {row} of a chunk holds NaN or infinity. The checkpoint is damaged, or training had diverged")
    return found_R


@torch.no_grad()
def fill_rtn(weight: Weight, rows: int | Tensor, values_RC: Tensor, *, name: str = "?") -> None:
    """Fills `weight` from dense `values_RC` (float, overwritten): from row `rows` on, or at the rows that an index tensor names.

    Beside a few numbers per row it takes ENCODE_BYTES_PER_ELEMENT for each of TILE_ELEMENTS values (10 MiB; on a device 160), and nothing where floats are
    held as floats.
    Raises InputError (with `name`) for NaN, infinities, widths that the format cannot hold and values that 16 bits cannot, EngineError for rows that share
    a scale with rows which neither this call nor `observe` has seen.
    """
    if not values_RC.numel():
        return
    if isinstance(weight, CudaWeight):  # encoded where they are held
        values_RC = values_RC.to(weight.packed.codes.device, non_blocking=True)  # what asks for the magnitudes waits for it
    magnitudes_R = _magnitudes(values_RC, name)
    target = slice(rows, rows + len(values_RC)) if isinstance(rows, int) else rows
    _refuse_overflow(weight.format_name, magnitudes_R, name)
    if weight.format_name in DTYPES:
        assert not isinstance(weight, QuantizedWeight), f"{weight.format_name} holds floats"
        weight.set_rows(target, values_RC)
        return
    if isinstance(weight, ScaledWeight) and weight.spans_rows and not weight.observed:
        _fill_whole(weight, target, values_RC, name)
        return
    step = max(1, (DEVICE_TILE_ELEMENTS if values_RC.is_cuda else TILE_ELEMENTS) // values_RC.shape[1])
    for start in range(0, len(values_RC), step):
        stop = min(start + step, len(values_RC))
        here = slice(target.start + start, target.start + stop) if isinstance(target, slice) else target[start:stop]
        weight.set_rows(here, _encode(weight, here, values_RC[start:stop].float(), name))


def _refuse_overflow(format_name: str, magnitudes_R: Tensor, name: str) -> None:
    dtype = DTYPES.get(format_name)
    if dtype is not None and magnitudes_R.max() > (largest := torch.finfo(dtype).max):
        raise InputError(f"tensor {name}: a weight of magnitude {magnitudes_R.max():.4g} does not fit {format_name} (at most {largest:.5g}). Use bf16")


def _encode(weight: Weight, rows: slice | Tensor, values_RC: Tensor, name: str) -> Codes:
    if isinstance(weight, ScaledWeight) and weight.spans_rows:
        scale_RG = weight.scales_of(rows)
        low_RG, high_RG = group_extremes(values_RC, weight.fmt.group or 0)
        if (torch.maximum(-low_RG, high_RG) > scale_RG * (weight.codec.largest * (1 + 1e-6))).any():
            raise EngineError(f"tensor {name}: larger values than `observe` has seen; observe every row before any is filled")
        return _encode_scaled(values_RC, weight.codec, scale_RG)
    try:
        return round_to_nearest(weight.format_name, values_RC)
    except InputError as error:
        raise InputError(f"tensor {name}: {error}") from error


def _fill_whole(weight: ScaledWeight, rows: slice | Tensor, values_RC: Tensor, name: str) -> None:
    """All rows at once: observed, then filled."""
    if len(values_RC) != weight.num_rows:
        raise EngineError(f"tensor {name}: rows of {weight.format_name} share scales; fill all {weight.num_rows} of them at once, or observe them all first")
    weight.observe(rows, values_RC)
    fill_rtn(weight, rows.start if isinstance(rows, slice) else rows, values_RC, name=name)
    weight.observed = False
