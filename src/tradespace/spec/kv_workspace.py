"""What reading a cache holds for a moment beside the queries, in closed form: the copy of a sequence, decoders' blocks, rebuilt layers. A conformance test
holds it against torch's own record of allocations.
"""

from __future__ import annotations

from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention

DECODE_ROWS = 256  # slots that a store decodes at a time
REBUILD_ROWS = 128  # older tokens that pass a layer at a time where they are rebuilt
DECODE_BYTES = 16  # an element that is being decoded: codes, groups in fp32, the result


def keys_read(kv: KVPlan, step_tokens: int, max_context: int) -> int:
    """Most tokens that one sequence's attention in one layer reads: all of its context, or what is kept and the step's own."""
    if kv.retain.capacity is None or kv.retain.rebuilds:
        return max_context
    return min(max_context, kv.retain.capacity + step_tokens)


def decoding_bytes(kv: KVPlan, mixer: Attention, D: int, element_bytes: int) -> int:
    """What decoding holds for the slots that it takes at a time, whatever the length; nothing where elements are floats of one kind."""
    if kv.is_plain:
        return 0
    width = D if kv.of_input else mixer.K * max(mixer.H, mixer.Hv)
    found = DECODE_ROWS * width * DECODE_BYTES
    if kv.of_input:  # keys and values before and after the norm and the rotation
        found += DECODE_ROWS * (D * element_bytes + (mixer.N + mixer.K) * mixer.H * element_bytes + mixer.K * (3 * mixer.H + mixer.Hv) * max(4, element_bytes))
    return found


def evicting_bytes(kv: KVPlan, mixer: Attention, num_keys: int) -> int:
    """Positions, scores and orders of one sequence's keys and heads: int64 and fp32, a few at a time."""
    return mixer.K * num_keys * 64 if kv.retain.evicts else 0


def rebuild_bytes(kv: KVPlan, mixer: Attention, D: int, max_context: int, element_bytes: int) -> int:
    """The residual stream of one sequence's older tokens, their keys and values in one layer, and the ids and positions of them."""
    if not kv.retain.rebuilds:
        return 0
    old = max(0, max_context - 1 - (kv.retain.capacity or 0))
    return old * (D * element_bytes + mixer.K * (mixer.H + mixer.Hv) * element_bytes + 16)
