"""How a product with a weight is cut into products of the library: by tiles of rows where the weight is coded, and by buckets of the step's rows.

What the library keeps per product and what is live in one follows from these shapes; the kernels do what is stated here, and tests compare.
"""

from __future__ import annotations

from tradespace.spec.formats import WeightFormat
from tradespace.spec.weights import tile_rows

# formats/int8.py: up to so many rows of bf16 go through torch's fused kernel, where a row of codes is a multiple of so many columns
INT8_FUSED_ROWS = 12
INT8_FUSED_COLUMNS = 32


def is_coded(held: WeightFormat) -> bool:
    """Whether a product has to decode the weight first.

    >>> from tradespace.spec.formats import FORMATS
    >>> [name for name in ("bf16", "int8", "q4_0") if is_coded(FORMATS[name])]
    ['int8', 'q4_0']
    """
    return held.group is not None or held.block is not None


def scales_products(held: WeightFormat) -> bool:
    """Whether bare codes are multiplied and the product is scaled, one scale a row."""
    return held.group == 0 and held.block is None and not held.activations


def fused_rows(held: WeightFormat, columns: int) -> int:
    """Rows of bf16 up to which torch's fused kernel takes the product: no dense product is made for them."""
    return INT8_FUSED_ROWS if held.name == "int8" and columns % INT8_FUSED_COLUMNS == 0 else 0


def dense_shapes(held: WeightFormat, outputs: int, columns: int) -> tuple[tuple[int, int, int], ...]:
    """(outputs, columns, rows above which it is made) of the library's products behind one with an (outputs, columns) matrix: a coded one comes in tiles.

    >>> from tradespace.spec.formats import FORMATS
    >>> dense_shapes(FORMATS["int8"], 8192, 576)
    ((3640, 576, 12), (912, 576, 12))
    """
    if not is_coded(held) or held.activations:
        return ((outputs, columns, 0),)
    tile = tile_rows(outputs, columns)
    above = fused_rows(held, columns)
    sizes = dict.fromkeys((tile, outputs % tile or tile))
    return tuple((size, columns, above) for size in sizes)
