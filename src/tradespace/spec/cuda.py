"""The CUDA kernels' share of a plan, without torch: which formats they read, how a weight and the kernels' scratch lie in memory, to the byte.

Codes lie in chunks of 32 rows by 64 or 128 columns, one after the other: what a program reads at once is one piece of memory (rows apart, 64 bytes each, ran
at 60% of the bandwidth). Within a chunk's row they change places so that they can be decoded without any exchange (`kernels/linear/packed.py`). Rows are padded
to whole chunks. Scales lie group by group, as many groups side by side as fill 4 bytes: a tile of rows reads them by the same kind of copy as its codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

from tradespace.spec.formats import ALIASES
from tradespace.spec.formats import FORMATS as WEIGHT_FORMATS
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, ModelSpec
from tradespace.spec.paged import mixer_refusal

CHUNK_ROWS = 32
FEW_ROWS = 64  # rows of activations up to which a layer's norms, residuals and gated activations are computed within its products
CODED_PASS = 128  # rows that codes meet at once where they are decoded in registers as they are multiplied
CODED_ROWS = 384  # up to which that takes less, pass by pass, than decoding a matrix into memory first
SQUARES_COLUMNS = 32  # columns of the residual stream that share a partial sum of squares
PARTIALS = 2**21  # fp32 numbers that products split along their columns leave for each other
UNPACK_ELEMENTS = 2**26  # of a coded matrix that are decoded at once for a product of many rows
KV_STORES = ("bf16", "fp16", "fp8", "int8")  # that attention reads and writes, keys and values alike
MULTIPROCESSORS = 132  # of an H100
WHOLE_PROMPT_TOKENS = 512  # from which on a prompt that a step holds whole is read by a library's attention: shorter ones are as fast in pages
SAMPLE_CHUNK = 2048  # logits of a row that one program of sampling looks at
ONE_QUERY_CONTEXT = 512  # tokens of a sequence alone up to which eight programs a head read its cache soon enough (at 2,048 they took 26 us more a layer)
ONE_QUERY_BYTES = 10 * 1024  # of shared memory for its scores: beside it lie the weights that two products have under way
ONE_QUERY_TILE, ONE_QUERY_RANKS = 16, 8  # keys of a tile, programs of a key-value head
MIXED_ROWS = (32, 64, 128, 256, 384, 512)  # tokens for which a mixed step is captured, as the host would take longer to launch its kernels than they take
MIXED_CONTEXT = 4096  # tokens of a sequence that decodes in a captured mixed step, which does not split its keys over programs
COUNTERS = 4096  # tiles of a split product, or (sequence, head) pairs of split attention, that count who is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a format lies. `kind` names the decoder ("bf16", "w8a8" and "f8a8", e4m3 met by e4m3 activations, need none: their rows lie as they are, as torch's
    own products read them); a chunk has
    `columns` columns of `bits`. `scale_bytes` and `zero_bytes` are the bytes of a scale and a zero point, one for each `group` columns of a row (0: of the
    whole row; None: no scales). nested: as `spec.formats.WeightFormat`.
    """

    kind: str
    columns: int
    bits: int
    group: int | None = None
    scale_bytes: int = 0
    zero_bytes: int = 0
    nested: int = 0

    @property
    def plain(self) -> bool:
        """Whether rows lie as they are."""
        return self.columns == 1

    @property
    def chunk_row_bytes(self) -> int:
        """Bytes of one row in a chunk."""
        return self.columns * self.bits // 8

    def chunks(self, columns: int) -> int:
        """Chunks along a row."""
        return ceil(columns / self.columns)

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        if self.group is None:
            return 0
        return ceil(columns / self.group) if self.group else 1


def held(groups: int, nbytes: int) -> int:
    """Numbers that a row's `groups` of `nbytes` take: whole words of 4 bytes where there are several.

    >>> held(5, 2), held(1, 4), held(5, 1)
    (6, 1, 8)
    """
    per_word = 4 // nbytes if nbytes else 1
    return ceil(groups / per_word) * per_word


FORMATS: dict[str, Layout] = {"bf16": Layout(kind="bf16", columns=1, bits=16)}
FORMATS |= {name: Layout(kind="int8", columns=128, bits=8, group=0, scale_bytes=4) for name in ("int8", "int8-tensor")}
FORMATS |= {name: Layout(kind=kind, columns=1, bits=8, group=0, scale_bytes=4) for name, kind in (("w8a8", "w8a8"), ("fp8-a8", "f8a8"))}
FORMATS |= {name: Layout(kind="fp8", columns=128, bits=8, group=0, scale_bytes=4) for name in ("fp8", "fp8-tensor")}
FORMATS |= {
    f"int4-g{group}{suffix}": Layout(kind="int4", columns=max(64, group), bits=4, group=group, scale_bytes=2, zero_bytes=zero)
    for group in (32, 64, 128)
    for suffix, zero in (("", 0), ("-zp", 1))
}
FORMATS |= {
    "nf4": Layout(kind="nf4", columns=64, bits=4, group=64, scale_bytes=1, nested=WEIGHT_FORMATS["nf4"].nested),
    "nf4-plain": Layout(kind="nf4", columns=64, bits=4, group=64, scale_bytes=4),
}
FORMATS |= {short: FORMATS[name] for short, name in ALIASES.items() if name in FORMATS}


def runs(format_name: str) -> bool:
    return format_name in FORMATS


def packed_bytes(format_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a packed matrix (R, C), or of a stack of them, whose rows lie one after the other.

    >>> packed_bytes("int4-g128", (4096, 4096)) == 4096 * (4096 // 2 + 4096 // 128 * 2)
    True
    >>> packed_bytes("int8", (10, 100)) == 32 * 128 + 10 * 4
    True
    """
    layout, rows, columns = FORMATS[format_name], prod(shape[:-1]), shape[-1]
    groups = layout.groups(columns)
    nested = 4 * ceil(rows * groups / layout.nested) + 4 if layout.nested else 0
    padded = rows if layout.plain else ceil(rows / CHUNK_ROWS) * CHUNK_ROWS
    codes = padded * layout.chunks(columns) * layout.chunk_row_bytes
    return codes + rows * sum(held(groups, nbytes) * nbytes for nbytes in (layout.scale_bytes, layout.zero_bytes) if nbytes) + nested


def scratch_bytes() -> int:
    """What the products of few rows share: partial sums and counters."""
    return 4 * PARTIALS + 4 * COUNTERS


def squares_tiles(columns: int, rows: int = FEW_ROWS) -> int:
    """Partial sums of squares of a row of the residual stream, where a step has `rows`. One alone has two of each block: halves of it may be computed apart."""
    return ceil(columns / SQUARES_COLUMNS) * (2 if rows == 1 else 1)


def attention_scratch_bytes(sequences: int, heads: int, value_width: int, splits: int) -> int:
    """What split attention keeps: of each sequence, query head and split its values, weighted, and the log-sum; and counters."""
    return 4 * sequences * heads * splits * (value_width + 1) + 4 * COUNTERS


def graph_rows(max_sequences: int) -> tuple[int, ...]:
    """Numbers of sequences for which a decode step is captured: a step of others takes the next larger one, its last rows idle. Ascending.

    >>> graph_rows(5), graph_rows(100)[-3:]
    ((1, 2, 4, 5), (80, 96, 100))
    """
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 1025, 64)]
    return (*(rows for rows in steps if rows < max_sequences), max_sequences)


def padded_heads(G: int) -> int:
    """Scores of a key as the kernel for one query holds them."""
    return G if G < 3 else ceil(G / 4) * 4


def one_query_context(model: ModelSpec) -> int:
    """Tokens up to which one sequence alone takes the kernel for one query (`kernels/attention/one_query.py`), where a layer does: its scores have that much
    room.
    """
    heads = max((padded_heads(layer.mixer.G) for layer in model.layers if isinstance(layer.mixer, Attention)), default=1)
    return min(ONE_QUERY_CONTEXT, ONE_QUERY_BYTES // (4 * (heads + 1)) // ONE_QUERY_TILE * ONE_QUERY_TILE * ONE_QUERY_RANKS)


def mixed_rows(step_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens for which a step is captured that reads prompts, or parts of them, beside sequences that decode. Ascending."""
    return tuple(rows for rows in MIXED_ROWS if rows <= step_tokens)


def mixed_sequences(rows: int, max_sequences: int) -> int:
    """Sequences of a captured mixed step of so many tokens, at most."""
    return min(max_sequences, rows // 2)


def captured_steps(model: ModelSpec, max_sequences: int, max_context: int, step_tokens: int) -> int:
    """Graphs: one for each of `graph_rows` and `mixed_rows`, and one for a sequence alone that is not long yet where sequences may be long."""
    return len(graph_rows(max_sequences)) + len(mixed_rows(step_tokens)) + (max_context > one_query_context(model))


def cache_refusal(kv: KVPlan) -> str | None:
    """Why the CUDA kernels cannot read such a cache, whatever the model; None: they can."""
    if kv.retain.kind != "full":
        return f"paged attention reads caches that retain everything, not {kv.retain.kind}"
    if kv.layout != "paged":
        return f"paged attention reads paged caches, not {kv.layout} ones"
    if kv.store not in KV_STORES or kv.value_store != kv.store:
        return f"paged attention reads keys and values alike in {', '.join(KV_STORES)}, not {kv.describe_store()}"
    return None


def refusal(model: ModelSpec, kv: KVPlan) -> str | None:
    """Why the CUDA step cannot compute such a model with such a cache; None: it can."""
    if reason := cache_refusal(kv):
        return reason
    for index, layer in enumerate(model.layers):
        if not isinstance(layer.mixer, Attention):
            return f"layer {index} of {model.name} is no softmax attention"
        if reason := mixer_refusal(layer.mixer):
            return f"layer {index} of {model.name}: {reason}"
        if not isinstance(layer.ffn, DenseFFN):
            return f"layer {index} of {model.name} has a routed feed-forward, or none"
        if layer.arrangement not in ("pre", "sandwich"):
            return f"layer {index} of {model.name} has its norms elsewhere than before each half ({layer.arrangement})"
    return None


@dataclass(frozen=True, slots=True)
class Buffers:
    """Widths of a step's buffers in bf16 elements a token (`codes`: 8-bit activations, 0 where no product takes such), and the bytes of all of them."""

    stream: int
    keys: int
    wide: int
    mixed: int
    codes: int
    logits: int

    def nbytes(self, step_tokens: int, logit_rows: int) -> int:
        """Bytes for `step_tokens` tokens, `logit_rows` rows of fp32 logits, and the sums of squares of few rows."""
        each = 2 * (3 * self.stream + self.keys + self.wide + self.mixed) + self.codes + (4 if self.codes else 0)
        # the rows that logits are computed of are gathered
        return each * step_tokens + (4 * self.logits + 2 * self.stream) * logit_rows + 4 * FEW_ROWS * squares_tiles(self.stream)


def buffers(model: ModelSpec, formats: Iterable[str]) -> Buffers:
    """Widths that the layers of `model` need when its matrices are in these formats; `refusal` comes first."""
    wide, mixed, keys, inner = model.D, 0, 0, model.D
    for layer in model.layers:
        mixer, ffn = layer.mixer, layer.ffn
        assert isinstance(mixer, Attention) and isinstance(ffn, DenseFFN), f"{model.name}: refusal() comes first"
        wide = max(wide, (mixer.N + mixer.K) * mixer.H + mixer.K * mixer.Hv, (2 if ffn.gated else 1) * ffn.F)
        mixed = max(mixed, mixer.N * (mixer.H + mixer.Hv), ffn.F)
        keys = max(keys, mixer.K * mixer.H)
        inner = max(inner, mixer.N * mixer.Hv, ffn.F)
    eight = any(FORMATS[name].kind in ("w8a8", "f8a8") for name in formats)
    return Buffers(model.D, keys, wide, mixed, inner if eight else 0, model.V)


def decode_splits(sequences: int, num_kv: int, max_context: int, multiprocessors: int = MULTIPROCESSORS) -> int:
    """Splits for which a step of so many sequences fills the device four times over, each at least 128 keys of the longest context; one where sequences and
    heads alone give every multiprocessor something to do.

    >>> decode_splits(1, 8, 32768), decode_splits(32, 8, 4096), decode_splits(1, 8, 100)
    (66, 1, 1)
    """
    if sequences * num_kv >= multiprocessors:
        return 1
    wanted = round(4 * multiprocessors / max(1, sequences * num_kv))
    return max(1, min(wanted, -(-max_context // 128), 128))


def whole_prompts_bytes(model: ModelSpec, step_tokens: int) -> int:
    """What a library's attention of whole prompts leaves beside the step's buffers, at most: the output of all tokens of the widest layer in bf16."""
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    widest = max((mixer.N * mixer.Hv for mixer in mixers if mixer.H <= 128 and mixer.Hv == mixer.H), default=0)
    return 2 * step_tokens * widest if step_tokens >= WHOLE_PROMPT_TOKENS else 0


def step_bytes(
    model: ModelSpec, formats: Iterable[str], step_tokens: int, logit_rows: int, max_sequences: int, max_context: int, multiprocessors: int = MULTIPROCESSORS
) -> int:
    """Bytes of a step's buffers, with what products of few rows and split attention share; the workspace that matrices are decoded into is another line."""
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    least = min(mixer.K for mixer in mixers)
    most = max(rows * decode_splits(rows, least, max_context, multiprocessors) for rows in graph_rows(max_sequences))
    attention = attention_scratch_bytes(most, max(mixer.N for mixer in mixers), max(mixer.Hv for mixer in mixers), 1)
    return buffers(model, formats).nbytes(step_tokens, logit_rows) + scratch_bytes() + attention


def inbox_bytes(step_tokens: int, sequences: int, rows: int, blocks: int, V: int) -> int:
    """Bytes on the device of what steps read (a decode step's own, and a mixed one's) and leave: tokens, and what sampling keeps for each row and chunk."""

    def inbox(tokens: int, logits: int) -> int:
        narrow = 4 * (sequences + 1 + sequences + sequences * blocks)
        return ceil((8 * (4 * tokens + logits) + narrow) / 8) * 8

    chunks = ceil(V / SAMPLE_CHUNK)
    return inbox(sequences, sequences) + inbox(step_tokens, rows) + 8 * rows + rows * (chunks * (4 + 8 + 4 + 4 * 17) + 5 * 4)
