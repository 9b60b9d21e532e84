"""The facts of GGUF that reader and writer share: ids, sizes of blocks, types of metadata values. Source: ggml's gguf.md and ggml-common.h."""

from collections.abc import Sequence

from tradespace.errors import InputError, UnsupportedError
from tradespace.loading.rawfile import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # ggml's own limit

# name → (id in the file, elements of a block, bytes of a block)
GGML_TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "F64": (28, 1, 8),
    "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 36),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292),
    "IQ1_S": (19, 256, 50), "IQ1_M": (29, 256, 56), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ2_S": (22, 256, 82),
    "IQ3_XXS": (18, 256, 98), "IQ3_S": (21, 256, 110), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136),
    "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
}  # fmt: skip
TYPE_NAMES = {type_id: name for name, (type_id, _, _) in GGML_TYPES.items()}
# ids that ggml once wrote and no longer reads
REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}

# id in the file → (name, code that struct and numpy share); a string and an array have no fixed size
VALUE_TYPES = {
    0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"), 4: ("uint32", "I"), 5: ("int32", "i"), 6: ("float32", "f"),
    7: ("bool", "?"), 8: ("string", ""), 9: ("array", ""), 10: ("uint64", "Q"), 11: ("int64", "q"), 12: ("float64", "d"),
}  # fmt: skip
VALUE_IDS = {name: type_id for type_id, (name, _) in VALUE_TYPES.items()}
STRING, ARRAY = VALUE_IDS["string"], VALUE_IDS["array"]


def tensor_nbytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor as GGUF stores it. Raises InputError where rows are not whole blocks, UnsupportedError for a type that ggml does not have.

    >>> tensor_nbytes("Q4_1", (2, 64)), tensor_nbytes("F32", (3,))
    (80, 12)
    """
    if type_name not in GGML_TYPES:
        raise UnsupportedError(f"GGML type {shown(type_name)} is unknown. Known: {', '.join(GGML_TYPES)}")
    _, block_elements, block_bytes = GGML_TYPES[type_name]
    num_elements = 1
    for size in shape:
        num_elements *= size
    if not shape or min(shape) < 1 or shape[-1] % block_elements:
        raise InputError(f"shape {list(shape)}: {type_name} needs 1 to {MAX_DIMS} sizes of at least 1, the last a multiple of {block_elements}")
    return num_elements // block_elements * block_bytes
