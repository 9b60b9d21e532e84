"""Outputs that obey a grammar: JSON, a JSON schema, a regular expression or EBNF, by xgrammar (arXiv:2411.15100).

A grammar is compiled once for the vocabulary, in a fork of this process, which shares all memory and can be ended when a hostile grammar takes too long
or too much. Back comes the serialized automaton. A step then costs one bit mask for each constrained row, applied to a copy of its logits in torch before
the native or torch kernel draws (`engine/sampler.py`).
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tradespace.errors import InputError, UnsupportedError
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.memory import parse_kb_fields, return_freed_memory
from tradespace.server.json_schema import schema_ebnf
from tradespace.server.messages import Grammar, Submit
from tradespace.units import MiB

COMPILE_S = 10.0  # a grammar that takes longer is refused
COMPILE_BYTES = 96 * MiB  # of data beyond what the process has
RESULT_BYTES = 8 * MiB
KEPT_BYTES = 24 * MiB  # of compiled grammars

_LIMITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf).astype(np.float32)  # (256, 8): of bits


class GrammarState:
    """One output's place in its grammar. bitmask: (1, V/32), bits of the tokens that may come next; kept: bits (V/32) of those that ever may."""

    def __init__(self, matcher: Any, bitmask: Tensor, kept: np.ndarray | None = None):
        self._matcher, self._bitmask, self._kept = matcher, bitmask, kept
        self._bits = bitmask.numpy()[0]

    def allow_(self, logits_V: Tensor) -> None:
        """-inf for every token that may not come next, in place."""
        if self._matcher.is_terminated():
            return
        self._matcher.fill_next_token_bitmask(self._bitmask)
        if self._kept is not None:
            np.bitwise_and(self._bits, self._kept, out=self._bits)
        # a look-up of eight limits for each byte: the library's own function goes over 32 integers for each word of the mask
        limits_V = _LIMITS.take(self._bits.view(np.uint8), axis=0, mode="clip").reshape(-1)[: len(logits_V)]
        logits_V[len(limits_V) :] = -torch.inf  # rows of the embedding that are no tokens
        logits_V = logits_V[: len(limits_V)]
        if logits_V.device.type == "cpu" and logits_V.dtype == torch.float32:
            values_V = logits_V.numpy()
            np.minimum(values_V, limits_V, out=values_V)
        else:
            logits_V.clamp_(max=torch.from_numpy(limits_V).to(logits_V))

    def accept(self, token: int) -> bool:
        return self._matcher.is_terminated() or self._matcher.accept_token(token)

    def copy(self) -> GrammarState:
        return GrammarState(self._matcher.fork(), self._bitmask, self._kept)


class Compiler:
    """Grammars → states, one at a time beside the engine's steps. The library loads with the first grammar."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, compile_s: float = COMPILE_S):
        self.tokenizer, self.vocab_size, self.compile_s = tokenizer, min(vocab_size, tokenizer.vocab_size), compile_s
        self._wanted: SimpleQueue[Submit] = SimpleQueue()
        self._done: SimpleQueue[tuple[Submit, GrammarState | InputError]] = SimpleQueue()
        self._pending: set[int] = set()
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._library: Any = None
        self._printed: np.ndarray | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return bool(self._pending)

    def begin(self, submit: Submit) -> None:
        """Compile the grammar of `submit`; `finished` brings it back."""
        self._pending.add(submit.id)
        self._wanted.put(submit)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
            self._thread.start()

    def forget(self, id: int) -> None:
        self._pending.discard(id)

    def finished(self) -> Iterator[tuple[Submit, GrammarState | InputError]]:
        """Those whose grammar is ready, or refused with the reason."""
        while self._pending:
            try:
                submit, state = self._done.get_nowait()
            except Empty:
                return
            if submit.id in self._pending:
                self._pending.discard(submit.id)
                yield submit, state

    def _work(self) -> None:
        while True:
            submit = self._wanted.get()
            assert submit.grammar is not None
            if submit.id not in self._pending:
                continue
            try:
                self._done.put((submit, self.state(submit.grammar)))
            except InputError as error:
                self._done.put((submit, error))
            except Exception as error:  # whatever the library raises: this thread serves the next grammar, too
                self._done.put((submit, InputError(f"the {submit.grammar.what} could not be compiled: {type(error).__name__}: {str(error)[:300]}")))

    def state(self, grammar: Grammar) -> GrammarState:
        """The first state of a grammar. Raises InputError where it is malformed or takes too much."""
        xgrammar, info = self._load()
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = xgrammar.CompiledGrammar.deserialize_json(self._in_child(xgrammar, info, grammar), info)
            return_freed_memory()  # the text of the automaton takes several times its room on its way
            self._compiled[grammar] = compiled
            while len(self._compiled) > 1 and sum(other.memory_size_bytes for other in self._compiled.values()) > KEPT_BYTES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        bitmask = torch.empty(1, (self.vocab_size + 31) // 32, dtype=torch.int32)
        kept = self._printed if grammar.kind in ("json_object", "json_schema") else None
        matcher = xgrammar.GrammarMatcher(compiled)
        matcher.fill_next_token_bitmask(bitmask)
        if not (bitmask.numpy()[0] & (-1 if kept is None else kept)).any():
            raise InputError(f"the {grammar.what} is not valid: nothing fits it, not even an empty answer")
        return GrammarState(matcher, bitmask, kept)

    def _load(self) -> tuple[Any, Any]:
        if self._library is None:
            try:
                import xgrammar
            except ImportError as error:
                raise UnsupportedError("constrained output needs xgrammar. Run: pip install 'tradespace[serve]'") from error
            if not self.tokenizer.eos_ids:
                raise UnsupportedError("this model names no end token: a constrained output could not end")
            words = [self.tokenizer.token_bytes(token) for token in range(self.vocab_size)]
            info = xgrammar.TokenizerInfo(words, xgrammar.VocabType.RAW, vocab_size=self.vocab_size, stop_token_ids=sorted(self.tokenizer.eos_ids))
            self._library, self._printed = (xgrammar, info), _printed_tokens(words)
        return self._library

    def _in_child(self, xgrammar: Any, info: Any, grammar: Grammar) -> str:
        """The serialized automaton, compiled in a fork that may use `compile_s` and COMPILE_BYTES."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _compile_and_exit(xgrammar, info, grammar, write)
        os.close(write)
        found, ends_s = bytearray(), time.monotonic() + self.compile_s
        try:
            os.set_blocking(read, False)
            while True:
                try:
                    part = os.read(read, 1 << 16)
                except BlockingIOError:
                    if time.monotonic() > ends_s:
                        raise InputError(f"the {grammar.what} takes more than {self.compile_s:g} s to compile. Make it simpler") from None
                    time.sleep(0.002)
                    continue
                if not part:
                    break
                found += part
                if len(found) > RESULT_BYTES:
                    raise InputError(f"the {grammar.what} compiles to more than {RESULT_BYTES // MiB} MiB. Make it simpler")
        finally:
            os.close(read)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if not found:
            raise InputError(f"the {grammar.what} takes more than {COMPILE_BYTES // MiB} MiB to compile. Make it simpler")
        mark, text = chr(found[0]), found[1:].decode()
        if mark != "+":
            raise InputError(f"the {grammar.what} is not valid: {text}")
        return text


def _printed_tokens(words: list[bytes]) -> np.ndarray:
    """Bits (V/32) of the tokens without a control character: JSON takes none in a string unescaped (RFC 8259, section 7), and the library's automata do."""
    bits = np.zeros(-(-len(words) // 32) * 32, np.uint8)
    bits[: len(words)] = [all(byte >= 0x20 for byte in word) for word in words]
    return np.packbits(bits, bitorder="little").view(np.int32).copy()


def _schema_ebnf(xgrammar: Any, schema: str, **whitespace: Any) -> str:
    return schema_ebnf(json.loads(schema), lambda marked: str(xgrammar.Grammar.from_json_schema(json.dumps(marked), **whitespace)))


def _counted_tags(xgrammar: Any, tags: str) -> dict[str, Any]:
    """A structural tag whose schemas have become grammars."""

    def counted(value: Any) -> Any:
        if isinstance(value, list):
            return [counted(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        if value.get("type") == "json_schema":
            ebnf = _schema_ebnf(xgrammar, json.dumps(value["json_schema"]), max_whitespace_cnt=value["max_whitespace_cnt"])
            return {"type": "grammar", "grammar": ebnf}
        return {name: counted(inner) for name, inner in value.items()}

    return counted(json.loads(tags))


def _compile_and_exit(xgrammar: Any, info: Any, grammar: Grammar, write: int) -> None:
    """In the child: writes "+" and the automaton, or "-" and what is wrong; never returns."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as stream:
            limit = parse_kb_fields(stream.read())["VmData"] + COMPILE_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library warns of what it reads, line by line: no client writes the log
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        match grammar.kind:
            case "json_object":
                compiled = compiler.compile_builtin_json_grammar()
            case "json_schema":
                compiled = compiler.compile_grammar(_schema_ebnf(xgrammar, grammar.text, any_whitespace=False))
            case "regex":
                compiled = compiler.compile_regex(grammar.text)
            case "grammar":
                compiled = compiler.compile_grammar(grammar.text)
            case "tool_calls":
                compiled = compiler.compile_structural_tag(_counted_tags(xgrammar, grammar.text))
        answer = b"+" + compiled.serialize_json().encode()
    except BaseException as error:
        # nothing said is how the parent learns that memory ran out
        short = isinstance(error, MemoryError) or "bad_alloc" in str(error)
        # the library says first when, and where in its own source
        said = re.sub(r"^\[[\d:]+\] \S+: (?:Check failed: )?", "", str(error))
        answer = b"" if short else b"-" + (said or type(error).__name__)[:400].encode(errors="replace")
    try:
        while answer:
            answer = answer[os.write(write, answer) :]
    finally:
        os._exit(0)
