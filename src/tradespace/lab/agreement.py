"""Do we compute what llama.cpp computes on real weights? Its logits on the same weights in F32, and on the file as it is stored, against ours in fp32.

The F32 file is written here from the same blocks, dequantized, so that what remains is arithmetic: the order of sums, its table of GELU values in half
precision. On the stored file llama.cpp rounds activations to int8 as well; that distance is its own choice, shown beside the other. Keys and values are kept
in F32 on both sides (its default is F16), and its fused attention is off. Both get the very same token ids.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tradespace import api
from tradespace.comparing import forward_of
from tradespace.errors import InputError
from tradespace.home import cache_folder
from tradespace.lab.common import command_line, markdown_table, read_text
from tradespace.loading.dequantize import iter_rows
from tradespace.loading.gguf import read_gguf, write_gguf
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record
from tradespace.quality.divergence import ROWS, compare, windows
from tradespace.quality.forward import Passage
from tradespace.units import MiB

if TYPE_CHECKING:
    from tradespace.llm import LLM

MODELS = ("smollm2-135m", "gemma3-270m")
# (attention, weights as we hold them, activations): every kernel on the weights as F32, and the native ones on the file's own blocks with int8 activations
OURS = (("sdpa", "fp32", "auto"), ("chunked", "fp32", "auto"), ("reference", "fp32", "auto"), ("native", "fp32", "fp32"), ("native", "stored", "auto"))
TEXTS = {"WikiText-2": ("wikitext2", "wiki.test.raw"), "books": ("pd-books", "valid.txt")}
POSITIONS, CONTEXT = 256, 512
GREEDY_PROMPT, GREEDY_TOKENS = 32, 64
F32, STORED = "F32", "as stored"
# what must hold: mean KL in nats and share of equal top tokens on the F32 file, mean KL on the stored one; and a tie that decides nothing
KL_BAR = {F32: 1e-4, STORED: 1e-2}
TOP1_BAR = 0.99
TIE = 1e-3
STAGING_BYTES = 16 * MiB


def require_llama_cpp() -> Any:
    """The module llama_cpp, or InputError saying how to get it."""
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        raise InputError(f"this comparison needs llama-cpp-python, which is not here ({error}). It is compiled in minutes: make oracles") from error


def write_f32_copy(source: Path, target: Path) -> None:
    """The GGUF file `source` with every tensor dequantized to F32 and all else as it is, tokenizer included. Holds a few rows at a time."""
    stored = read_gguf(source)

    def rows(name: str) -> Iterator[memoryview]:
        for _, rows_RC in iter_rows(stored, name, staging_bytes=STAGING_BYTES):
            yield rows_RC.numpy().data.cast("B")

    tensors = [(name, tensor.shape, "F32", partial(rows, name)) for name, tensor in stored.tensors.items()]
    write_gguf(target, stored.metadata | {"general.file_type": 0}, tensors, types=stored.metadata_types)


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU, keys and values in F32 or as it has them by itself (`usual_cache`: F16), one sequence of at most `context` tokens.

    A context manager.
    """

    def __init__(self, path: Path, *, context: int = CONTEXT, threads: int = 1, usual_cache: bool = False):
        library = require_llama_cpp()
        element = None if usual_cache else library.GGML_TYPE_F32
        self._model = library.Llama(
            str(path), n_ctx=context, n_batch=ROWS, n_threads=threads, n_threads_batch=threads, logits_all=True, type_k=element, type_v=element, verbose=False
        )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *details: object) -> None:
        self._model.close()

    @property
    def context(self) -> int:
        """Tokens that it made room for: what was asked, rounded up to whole 256s. By this it chooses between longrope's two lists of factors."""
        return self._model.n_ctx()

    def logprobs(self, window: Sequence[int]) -> Iterator[Tensor]:
        """As `quality.divergence.next_token_logprobs`: (rows, V) in fp32, ROWS at a time."""
        self._model.reset()
        for start in range(0, len(window), ROWS):
            yield self._eval(window[start : start + ROWS]).log_softmax(-1)

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """The `count` likeliest tokens after `prompt` one by one, ends of text included, and how far the best logit was above the second at each."""
        self._model.reset()
        tokens, gaps = [], []
        logits_RV = self._eval(prompt)
        for _ in range(count):
            best = logits_RV[-1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            logits_RV = self._eval(tokens[-1:])
        return tokens, gaps

    def _eval(self, tokens: Sequence[int]) -> Tensor:
        """Logits (len(tokens), V) after each of these tokens, which follow those evaluated before."""
        start = self._model.n_tokens
        self._model.eval(list(tokens))
        return torch.from_numpy(self._model.scores[start : start + len(tokens)].copy())


@dataclass(frozen=True, slots=True)
class Greedy:
    """equal: tokens in agreement from the start. decided: tokens before the first position where the oracle's two best logits lie within TIE."""

    tokens: int
    equal: int
    decided: int

    @property
    def holds(self) -> bool:
        return self.equal >= self.decided


def compare_greedy(ours: Sequence[int], theirs: Sequence[int], gaps: Sequence[float]) -> Greedy:
    """Two greedy continuations of one prompt; `gaps` are the oracle's, best logit minus second.

    >>> compare_greedy([5, 6, 9], [5, 6, 7], [0.3, 0.2, 0.0004])
    Greedy(tokens=3, equal=2, decided=2)
    """
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
    return Greedy(len(theirs), equal, next((i for i, gap in enumerate(gaps) if gap <= TIE), len(gaps)))


def token_window(tokenizer: Tokenizer, text: str, positions: int) -> list[int]:
    """One window that predicts `positions` tokens of `text`, with a BOS in front where the model's tokenizer puts one."""
    bos_id = tokenizer.bos_id if tokenizer.encode("a")[0] == tokenizer.bos_id else None
    # eight characters a token are plenty in any of these texts
    return windows(tokenizer.encode(text[: 8 * positions + 64], add_special_tokens=False), positions + 1, bos_id=bos_id, count=1)[0]


def open_ours(model: str, attention: str, weights: str, activations: str, context: int = CONTEXT, kv_store: str | None = "fp32") -> LLM:
    """Our engine on `model`, through the public API; keys and values in `kv_store`, None: in what the planner takes by itself."""
    import tradespace as ts

    pins = {"weights": weights, "attention": attention, "activations": activations, "layout": "paged", "block_size": "16"}
    pins |= {} if kv_store is None else {"kv_store": kv_store}
    files = resolve(model)
    spec = api.spec_of_files(files)
    best = api.plan(spec, memory="6GiB", context=context, concurrency=8, runnable_only=True, pins=pins, stored=api.stored_weights(files, spec)).best
    assert best is not None, "6 GiB hold it"
    return ts.open(model, plan=best.plan)


@dataclass(frozen=True, slots=True)
class Heard:
    """What llama.cpp said to one window: log-probabilities in pieces of ROWS, its greedy tokens after the window's first GREEDY_PROMPT and their gaps."""

    logprobs: list[Tensor]
    greedy: tuple[list[int], list[float]]


def listen(path: Path, texts: Mapping[str, list[int]]) -> dict[str, Heard]:
    """llama.cpp's answers to all texts, held in memory (256 rows of a vocabulary of 262,144: 256 MiB), so that our kernels can be compared in turn."""
    with LlamaCpp(path) as oracle:
        return {name: Heard(list(oracle.logprobs(window)), oracle.greedy(window[:GREEDY_PROMPT], GREEDY_TOKENS)) for name, window in texts.items()}


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Every model, text and attention kernel against both files (quick: the first of each); and greedy continuations through the engine and its cache."""
    version = require_llama_cpp().__version__
    rows: list[dict[str, Any]] = []
    for model in MODELS[:1] if quick else MODELS:
        files = resolve(model)
        path, tokenizer = files.weights[0], Tokenizer.from_files(files)
        texts = {name: token_window(tokenizer, read_text(*parts), POSITIONS) for name, parts in list(TEXTS.items())[: 1 if quick else None]}
        cache_folder().mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="f32-", dir=cache_folder()) as folder:
            copy = Path(folder) / f"{model}.gguf"
            write_f32_copy(path, copy)
            heard = {F32: listen(copy, texts), STORED: listen(path, texts)}
        for ours in OURS[:1] if quick else OURS:
            kernel, held, _ = ours
            with open_ours(model, *ours) as llm:
                for weights in heard if kernel in ("sdpa", "native") else (F32,):
                    for text, window in texts.items():
                        row = {"model": model, "file": weights, "attention": kernel, "ours": held, "text": text}
                        row |= _row(llm, weights, held, window, heard[weights][text])
                        say(f"{model}, {weights}, {kernel} {held}, {text}: KL {row['mean_kl']:.1e} nats a token, top token {row['top1_agreement']:.2%}")
                        rows.append(row)
    notes = f'llama-cpp-python {version}; ours as "ours" says; windows of {POSITIONS} predicted tokens; greedy: {GREEDY_TOKENS} tokens after {GREEDY_PROMPT}'
    return new_record("agreement", command=command_line(), device=this_machine(), repeats=1, rows=rows, notes=notes)


def _row(llm: LLM, weights: str, held: str, window: list[int], heard: Heard) -> dict[str, Any]:
    import tradespace as ts

    theirs = torch.cat(heard.logprobs)[:-1]  # the last token predicts nothing that is in the window
    forward = forward_of(llm, rows=ROWS)
    found = compare(lambda _: iter(theirs.split(ROWS)), lambda passage: iter(torch.cat(list(forward.logprobs(passage))).split(ROWS)), [Passage(window)])
    row = {key: getattr(found, key) for key in found.__dataclass_fields__}
    exact = weights == F32 and held == "fp32"  # where either side rounds its activations to int8, that distance is what is shown
    row["holds"] = found.mean_kl <= KL_BAR[F32 if exact else STORED] and (not exact or found.top1_agreement >= TOP1_BAR)
    if exact:
        params = ts.SamplingParams(max_tokens=GREEDY_TOKENS, temperature=0, ignore_eos=True)
        greedy = compare_greedy(llm.generate([window[:GREEDY_PROMPT]], params)[0].output_ids, *heard.greedy)
        row |= {"greedy_tokens": greedy.tokens, "greedy_equal": greedy.equal, "greedy_decided": greedy.decided}
        row["holds"] = row["holds"] and greedy.holds
    return row


def markdown(record: Record) -> str:
    header = (
        "model",
        "llama.cpp's weights",
        "ours",
        "text",
        "mean KL, nats",
        "99%",
        "same top token",
        "perplexity, ours (theirs)",
        "greedy tokens equal",
    )
    rows = [
        (
            r["model"],
            r["file"],
            f"{r['attention']}, {r['ours']}",
            r["text"],
            f"{r['mean_kl']:.1e}",
            f"{r['p99_kl']:.1e}",
            f"{r['top1_agreement']:.2%}",
            f"{r['perplexity']:.3f} ({r['reference_perplexity']:.3f})",
            f"{r['greedy_equal']} of {r['greedy_tokens']}" if "greedy_equal" in r else "",
        )
        for r in record.rows
    ]
    exact = [r for r in record.rows if r["file"] == F32 and r["ours"] == "fp32"]
    worst = {F32: max((r["mean_kl"] for r in exact), default=math.nan), STORED: max((r["mean_kl"] for r in record.rows if r not in exact), default=math.nan)}
    held = "hold everywhere" if all(r["holds"] for r in record.rows) else "DO NOT hold everywhere"
    bars = (
        f"Bars: mean KL at most {KL_BAR[F32]:g} where both compute in fp32 and {KL_BAR[STORED]:g} where one of them rounds activations to int8, or both do; in "
        f"fp32 the top token equal at {TOP1_BAR:.0%} and greedy tokens equal"
    )
    return (
        f"{markdown_table(header, rows, left=4)}\n\n{bars} up to the first near-tie of {TIE:g}: they {held} "
        f"(worst mean KL {worst[F32]:.1e} and {worst[STORED]:.1e})."
    )
