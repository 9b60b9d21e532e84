"""The native CPU kernels' share of a plan, without torch: which formats they read, how a packed matrix and a step's buffers lie in memory, to the byte.

A packed matrix has its rows in panels of 16 and its columns in sections of 32 (`kernels/native/source/weights.h`); both are padded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tradespace.spec.formats import ALIASES
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, ModelSpec

LANES = 16
SECTION = 32
ROW_BLOCK = 8  # rows of activations whose scales and sums of a section lie side by side
SECTION_SUMS = 4  # sums of a section's codes, beside its scale and its weighted sum
STEP_TOKENS = 512  # a step with more runs no faster
SUPER_SECTIONS = 8
CHUNK = 128  # keys of a partial result of attention
ROWS = 12  # query rows that share a pass over the keys
SLOTS_PER_THREAD = 64  # partial results that attention keeps for each thread
PAIR_PRODUCTS = "avx512_bf16"  # the instruction set with which attention multiplies a bf16 cache as it lies
KV_STORES = ("fp32", "fp16", "bf16", "int8", "fp8")  # that attention reads and writes, keys and values alike


@dataclass(frozen=True, slots=True)
class Kind:
    """One of `weights.h`'s kinds: its number there, bits of a code, bytes of heads, and the activations that it is multiplied by."""

    number: int
    bits: int
    panel_head: int = 0
    group_head: int = 0
    super_head: int = 0
    section_head: int = 0
    activations: str = "int8"


KINDS: dict[str, Kind] = {
    "f32": Kind(0, 32, activations="fp32"),
    "f16": Kind(1, 16, activations="fp32"),
    "bf16": Kind(2, 16, activations="bf16"),
    "i8_row": Kind(3, 8, panel_head=64),
    "q8": Kind(4, 8, group_head=32),
    "q4": Kind(5, 4, group_head=32),
    "q4_min": Kind(6, 4, group_head=64),
    "q5": Kind(7, 5, group_head=32),
    "q5_min": Kind(8, 5, group_head=64),
    "q4_zero": Kind(9, 4, group_head=48),
    "q3": Kind(10, 3, group_head=32),
    "q3_zero": Kind(11, 3, group_head=48),
    "q2": Kind(12, 2, group_head=32),
    "q2_zero": Kind(13, 2, group_head=48),
    "q4_k": Kind(14, 4, super_head=64, section_head=32),
    "q5_k": Kind(15, 5, super_head=64, section_head=32),
    "q6_k": Kind(16, 6, super_head=32, section_head=32),
}

# weight format → (kind, sections that share a scale)
FORMAT_KINDS: dict[str, tuple[str, int]] = {
    "fp32": ("f32", 1),
    "fp16": ("f16", 1),
    "bf16": ("bf16", 1),
    "int8": ("i8_row", 1),
    "q8_0": ("q8", 1),
    "q4_0": ("q4", 1),
    "q4_1": ("q4_min", 1),
    "q5_0": ("q5", 1),
    "q5_1": ("q5_min", 1),
    "q4_k": ("q4_k", 1),
    "q5_k": ("q5_k", 1),
    "q6_k": ("q6_k", 1),
    **{f"int{bits}-g{group}": (f"q{bits}", group // SECTION) for bits in (2, 3, 4) for group in (32, 64, 128)},
    **{f"int{bits}-g{group}-zp": (f"q{bits}_zero", group // SECTION) for bits in (2, 3, 4) for group in (32, 64, 128)},
}
FORMAT_KINDS |= {short: FORMAT_KINDS[name] for short, name in ALIASES.items()}


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def panel_bytes(format_name: str, columns: int) -> int:
    """Bytes of 16 packed rows; equals `ts_panel_bytes` of the library."""
    kind, group = FORMAT_KINDS[format_name]
    found, sections = KINDS[kind], -(-columns // SECTION)
    total = found.panel_head + sections * (LANES * SECTION * found.bits // 8 + found.section_head)
    total += -(-sections // group) * found.group_head
    return total + -(-sections // SUPER_SECTIONS) * found.super_head


def packed_bytes(format_name: str, rows: int, columns: int) -> int:
    """Bytes of a packed (rows, columns) matrix.

    >>> packed_bytes("q4_0", 960, 576), 960 * 576 * 18 // 32
    (311040, 311040)
    """
    return -(-rows // LANES) * panel_bytes(format_name, columns)


def runs(format_name: str) -> bool:
    return format_name in FORMAT_KINDS


def cache_refusal(kv: KVPlan) -> str | None:
    """Why native attention cannot read such a cache, whatever the model; None: it can."""
    if kv.retain.kind != "full":
        return f"native attention reads caches that retain everything, not {kv.retain.kind}"
    if kv.store not in KV_STORES or kv.value_store != kv.store:
        return f"native attention reads keys and values alike in {', '.join(KV_STORES)}, not {kv.describe_store()}"
    if kv.layout == "paged" and kv.block_size % LANES:
        return f"native attention reads keys in tiles of {LANES}: the block size must be a multiple of that, not {kv.block_size}"
    return None


def tiles_refusal(model: ModelSpec, kv: KVPlan) -> str | None:
    """Why such a model's keys and values cannot lie in the native kernels' tiles; None: they can."""
    if reason := cache_refusal(kv):
        return reason
    for index, layer in enumerate(model.layers):
        if kv.store == "bf16" and isinstance(layer.mixer, Attention) and layer.mixer.H % 2:
            return f"a bf16 cache holds keys in pairs of numbers; those of layer {index} of {model.name} have {layer.mixer.H}"
    return None


def usual_store(weights_name: str, activations: str, instruction_sets: Collection[str], model: ModelSpec) -> str:
    """The 16 bits in which a native step caches keys and values unless told otherwise: bf16 where queries and weights of attention are rounded to that as well,
    which doubles the rate of its products, else fp16."""
    has_products = PAIR_PRODUCTS in instruction_sets and activation_form(weights_name, activations) != "fp32"
    return "bf16" if has_products and tiles_refusal(model, KVPlan(store="bf16")) is None else "fp16"


def refusal(model: ModelSpec, kv: KVPlan) -> str | None:
    """Why the native step cannot compute such a model with such a cache; None: it can."""
    if reason := tiles_refusal(model, kv):
        return reason
    for index, layer in enumerate(model.layers):
        mixer = layer.mixer
        if not isinstance(mixer, Attention):
            return f"layer {index} of {model.name} is no softmax attention"
        if mixer.pattern is not None:
            return f"layer {index} of {model.name} has a {mixer.pattern.kind} attention pattern; native attention knows windows only"
        if mixer.output_gate or mixer.alibi or mixer.value_from_keys or mixer.head_gate:
            return f"layer {index} of {model.name} has attention with gates, linear biases or shared projections"
        if not isinstance(layer.ffn, DenseFFN):
            return f"layer {index} of {model.name} has a routed feed-forward, or none"
    return None


def block_slots(kv: KVPlan, max_context: int) -> int:
    """Token slots of one block: the page, or where contiguous a sequence's region, rounded up to whole tiles."""
    return kv.block_size if kv.layout == "paged" else round_up(max_context, LANES)


def activation_form(format_name: str, activations: str) -> str:
    """fp32, bf16 or int8: what a matrix in this format is multiplied by; `activations` "fp32" asks for exact products."""
    return "fp32" if activations == "fp32" else KINDS[FORMAT_KINDS[format_name][0]].activations


@dataclass(frozen=True, slots=True)
class Buffers:
    """Widths of a step's buffers in floats a token, and the bytes of all of them."""

    stream: int
    wide: int
    mixed: int
    operand: int
    logits: int

    def nbytes(self, step_tokens: int, logit_rows: int, forms: frozenset[str], threads: int, value_width: int) -> int:
        """Bytes for `step_tokens` tokens and `logit_rows` rows of logits, with operands in these forms."""
        rows, sections = max(step_tokens, logit_rows), self.operand // SECTION
        operand = rows * sum({"fp32": 4, "bf16": 2, "int8": 1}[form] * self.operand for form in forms)
        if "int8" in forms:
            operand += 4 * (2 + SECTION_SUMS) * sections * round_up(rows, ROW_BLOCK)
        # the embedding is looked up in whole sections, so the last row of the stream may be written past its end
        floats = (self.stream + self.wide + self.mixed) * step_tokens + self.logits * logit_rows + SECTION
        partials = threads * SLOTS_PER_THREAD * partial_floats(value_width)
        return 4 * (floats + partials + threads * self.scratch) + operand

    @property
    def scratch(self) -> int:
        """Floats a thread: a row of the widest norm."""
        return round_up(max(self.stream, self.operand), SECTION) + SECTION


def buffers(model: ModelSpec) -> Buffers:
    """Widths that the layers of `model` need."""
    stream = round_up(model.D, SECTION)
    wide, mixed, operand = stream, 0, stream
    for layer in model.layers:
        mixer, ffn = layer.mixer, layer.ffn
        assert isinstance(mixer, Attention) and isinstance(ffn, DenseFFN), f"{model.name}: refusal() comes first"
        wide = max(wide, round_up((mixer.N + mixer.K) * mixer.H + mixer.K * mixer.Hv, LANES), round_up((2 if ffn.gated else 1) * ffn.F, LANES))
        mixed = max(mixed, round_up(mixer.N * mixer.Hv, SECTION))
        operand = max(operand, round_up(mixer.N * mixer.Hv, SECTION), round_up(ffn.F, SECTION))
    if any(layer.arrangement in ("sandwich", "post", "parallel", "parallel2") for layer in model.layers):
        mixed = max(mixed, stream)
    return Buffers(apart(stream), apart(wide), apart(mixed), operand, apart(model.V))


def apart(width: int) -> int:
    """Floats from one row of a buffer to the next: an odd number of cache lines. Products write a line of many rows, one below the other; an even number, and
    most of all a multiple of a page, would have them meet in few sets of the first cache.

    >>> apart(3072), apart(576), apart(49152), apart(100)
    (3088, 592, 49168, 112)
    """
    lines = -(-width // LANES)
    return LANES * (lines + (lines + 1) % 2)


def value_width(model: ModelSpec) -> int:
    return max(layer.mixer.Hv for layer in model.layers if isinstance(layer.mixer, Attention))


def forms(formats: Mapping[str, str], activations: str) -> frozenset[str]:
    """The forms of activations that matrices in these formats are multiplied by."""
    return frozenset(activation_form(name, activations) for name in formats.values())


def partial_floats(value_width: int) -> int:
    """Floats of one partial result of attention: largest score and sum of each row, and its weighted values."""
    return ROWS * round_up(value_width, LANES) + 2 * LANES


def sample_bytes(vocab_size: int, rows: int, threads: int) -> int:
    """Bytes that sampling holds for each row that is chosen from at once: its tempered logits, and those of them that it looks at closer."""
    return min(rows, threads) * 2 * 4 * round_up(vocab_size, LANES)
