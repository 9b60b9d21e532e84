"""What an attention kernel holds at most beside the queries and the cache, in closed form, and the sizes of its tiles, which the kernels take from here.

Everything is per call and shared by all layers, except what `Sdpa` keeps for the layers of a step (masks and rows to gather): that counts once per distinct
window. A conformance test holds each formula against torch's own record of allocations.
"""

from __future__ import annotations

from tradespace.errors import InputError
from tradespace.spec.attention import chunk_size
from tradespace.spec.attention_pattern import BlockSparse, Selected
from tradespace.spec.mixers import Attention

REFERENCE_ROWS = 8  # queries per tile
REFERENCE_KEYS = 64  # keys are padded to a multiple of this
CHUNKED_QUERIES = 256  # queries per block
KEPT_QUERIES = 64  # queries per block over what a retention policy kept
SDPA_QUERIES = 128  # prefill: queries per call
SDPA_FEW = 8  # up to so many queries a sequence are rows of one product
GATHER_BYTES = 6 * 2**20  # keys and values of one shared call
_FUSED_ROWS, _FUSED_KEYS = 32, 512  # the tile of scores that each thread of torch's fused CPU kernel holds
_PACKED_QUERIES = 64  # below this many queries or keys nothing is packed


def workspace_bytes(
    kernel: str,
    mixer: Attention,
    *,
    step_tokens: int,
    max_context: int,
    max_sequences: int,
    kv_tokens: int,
    element_bytes: int,
    copies: bool,
    threads: int,
    kept: bool = False,
    weighed: bool = False,
) -> int:
    """An upper bound for steps of up to `step_tokens` queries over sequences of up to `max_context`, `kv_tokens` tokens in all; the output is included.

    copies: reading a sequence copies it (the paged layout, or a store that is not the activations' dtype); element_bytes: the activations'.
    kept: keys are what a retention policy left; weighed: it also wants attention weights.
    """
    out = step_tokens * mixer.N * mixer.Hv * element_bytes
    copied = max_context * key_bytes(mixer, element_bytes) if copies else 0
    if kept:
        return out + copied + _kept(kernel, mixer, min(step_tokens, KEPT_QUERIES), max_context, element_bytes, weighed)
    if kernel == "reference":
        return 2 * out + copied + _reference(mixer, max_context)
    if kernel == "chunked":
        return out + copied + _chunked(mixer, min(step_tokens, CHUNKED_QUERIES), max_context)
    if kernel == "native":  # its partial results are among the step's buffers (`spec/native.py`)
        return out + step_tokens * mixer.N * 4
    if kernel == "paged":  # its own buffers are the step's (`spec/cuda.py`); called by itself it copies what the sequences see into pages
        return out + max_sequences * max_context * key_bytes(mixer, element_bytes)
    if kernel == "flash":
        # sequences that are computed together lie together: copied one by one, GATHER_BYTES of them at most, or a single longer one; then outputs are joined
        several = min(max_sequences, step_tokens) > 1
        gathered = 2 * min(GATHER_BYTES, kv_tokens * key_bytes(mixer, element_bytes)) if several else 0
        return out * (2 if several else 1) + max(copied, gathered) + _flash(mixer, step_tokens, max_context, max_sequences)
    if kernel == "sdpa":
        return out + _sdpa(mixer, step_tokens, max_context, max_sequences, kv_tokens, element_bytes, copied, threads)
    raise InputError(f"no workspace formula for attention kernel '{kernel}'")


def key_bytes(mixer: Attention, element_bytes: int) -> int:
    """One token's key and value in the activations' dtype.

    >>> key_bytes(Attention(N=9, K=3, H=64), 2)
    768
    """
    return mixer.K * (mixer.H + mixer.Hv) * element_bytes


def fused_key_bytes(mixer: Attention, element_bytes: int) -> int:
    """`key_bytes` and, where keys and values are not equally wide, the copy that makes them so."""
    return key_bytes(mixer, element_bytes) + (mixer.K * max(mixer.H, mixer.Hv) * element_bytes if mixer.Hv != mixer.H else 0)


def _kept(kernel: str, mixer: Attention, num_queries: int, num_keys: int, element_bytes: int, weighed: bool) -> int:
    """Keys and values in fp32, scores of a block of queries, masks per head, and the weights that are handed back (`kernels/attention/kept.py`)."""
    block = chunk_size(num_keys) if kernel == "chunked" else num_keys
    fused = kernel == "sdpa"  # scores stay in tiles, and keys in their dtype
    scores = 0 if fused else 3 * mixer.N * num_queries * block * 4
    masks = (mixer.K if weighed else 1) * num_queries * num_keys * (4 + element_bytes)
    rows = num_queries * mixer.N * (mixer.H + 3 * mixer.Hv + 6) * 4
    widened = 0 if fused and mixer.Hv == mixer.H else mixer.K * (mixer.H + mixer.Hv) * block * 4 * 2
    return scores + masks + rows + widened + 2 * mixer.K * num_keys * 4 + 24 * num_keys


def _flash(mixer: Attention, step_tokens: int, max_context: int, max_sequences: int) -> int:
    """One log-sum per query and head, eight numbers a sequence, and the lists of a pattern of blocks: chosen ones are scored first, (n/block)² a head."""
    held = step_tokens * mixer.N * 4 + 32 * max_sequences
    pattern = mixer.pattern
    if isinstance(pattern, BlockSparse):
        blocks = -(-max_context // pattern.block)
        held += 2 * 4 * blocks * (pattern.local + pattern.leading + pattern.random + 1)
    if isinstance(pattern, Selected):
        blocks = -(-max_context // pattern.block)
        # scores, ranked scores twice, their order (int64) twice, flags; afterwards flags and both lists (int64 pairs)
        held += mixer.N * blocks * blocks * (3 * 4 + 2 * 8 + 4) + 2 * max_context * (mixer.N + mixer.K) * mixer.H * 4
    return held


def _reference(mixer: Attention, max_context: int) -> int:
    num_keys = -(-max_context // REFERENCE_KEYS) * REFERENCE_KEYS
    if mixer.window is not None:  # a window straddles one more tile at either end
        num_keys = min(num_keys, -(-(mixer.window + REFERENCE_ROWS) // REFERENCE_KEYS) * REFERENCE_KEYS + REFERENCE_KEYS)
    keys_and_values = mixer.K * (mixer.H + mixer.Hv) * num_keys * 4
    cast = mixer.K * max(mixer.H, mixer.Hv) * num_keys * 4  # to fp32, before it is padded
    scores = mixer.N * REFERENCE_ROWS * (num_keys + 1) * 4  # + 1: a sink
    rows = mixer.N * REFERENCE_ROWS * (mixer.H + mixer.Hv) * 4
    return keys_and_values + max(cast, 3 * scores) + 3 * rows + REFERENCE_ROWS * num_keys + 8 * num_keys  # mask, positions


def _chunked(mixer: Attention, num_queries: int, max_context: int) -> int:
    block = chunk_size(max_context)
    rows = num_queries * mixer.N
    scores = rows * block * 4
    held = rows * (mixer.H + 3 * mixer.Hv + 6) * 4  # queries; the output, rescaled, and with the block added; sums and peaks
    return held + 3 * scores + num_queries * block * 3 + block * mixer.K * (mixer.H + mixer.Hv) * 4


def _sdpa(mixer: Attention, step_tokens: int, max_context: int, max_sequences: int, kv_tokens: int, element_bytes: int, copied: int, threads: int) -> int:
    wide = max(mixer.H, mixer.Hv)
    widened = fused_key_bytes(mixer, element_bytes) - key_bytes(mixer, element_bytes)
    num_queries = min(step_tokens, SDPA_QUERIES)
    rows = num_queries * mixer.N * (2 * wide + 2 * mixer.Hv) * element_bytes + num_queries * mixer.N * 4  # queries, results, reversed results; logsumexp
    ruler = ((1 << (max_context - 1).bit_length()) + SDPA_QUERIES) * (element_bytes + 9)  # built from int64 positions and bools
    many = copied + max_context * widened + rows
    # a sequence that decodes alone is copied whole where reading copies; shared calls stay under GATHER_BYTES
    decoding = min(max_sequences, step_tokens)
    padded_keys = kv_tokens * 4 // 3 + 64 * decoding  # sequences in a group differ by a quarter or by 64
    gathered = max(copied + max_context * widened, min(GATHER_BYTES, padded_keys * fused_key_bytes(mixer, element_bytes)) if decoding > 1 else 0)
    few = gathered + min(step_tokens, decoding * SDPA_FEW) * mixer.N * (3 * wide + mixer.Hv) * element_bytes
    drafted = min(SDPA_FEW, step_tokens // max(1, decoding)) if decoding else 1
    mask_rows = drafted * mixer.G if drafted > 1 else 1
    prepared = padded_keys * (8 + mask_rows * element_bytes)
    tiles = threads * _FUSED_ROWS * (_FUSED_KEYS * (4 + element_bytes) + (2 + wide) * 4)
    return max(many, few) + ruler + prepared + tiles + tile_packing_bytes(mixer, num_queries, max_context, element_bytes)


def tile_packing_bytes(mixer: Attention, num_queries: int, max_context: int, element_bytes: int) -> int:
    """Where a CPU has tiles (AMX) torch packs 16-bit keys and values for them: for every query head, whole blocks of keys. Booked on every CPU."""
    if element_bytes != 2 or min(num_queries, max_context) < _PACKED_QUERIES:
        return 0
    return mixer.N * 2 * max(mixer.H, mixer.Hv) * (-(-max_context // _FUSED_KEYS) * _FUSED_KEYS) * element_bytes
