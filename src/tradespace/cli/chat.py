"""`tradespace chat`: a conversation. Ctrl-C stops the answer and not the program; /help lists the commands."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tradespace.cli.options import (
    Activations,
    Attention,
    Context,
    Device,
    Json,
    KVRetain,
    KVStore,
    Memory,
    Model,
    Offline,
    PlanFile,
    PrefixSharing,
    Revision,
    WeightFormat,
    console,
    print_json,
    write_file,
)
from tradespace.cli.run import MaxTokens, MinP, RepetitionPenalty, Seed, Temperature, TopK, TopP, decoded, report_table
from tradespace.errors import InputError, TradespaceError

if TYPE_CHECKING:
    from tradespace.engine.request import SamplingParams
    from tradespace.llm import LLM

HELP = """/help            this list
/clear           forget the conversation
/undo            forget the last question and its answer
/retry           answer the last question again, with another seed
/system TEXT     set the system message and start over
/set NAME VALUE  temperature, top_k, top_p, min_p, max_tokens, seed
/save FILE       write the conversation as JSON
/report          predicted against measured, so far
/exit            leave (Ctrl-D, too)"""
SETTABLE = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "max_tokens": int, "seed": int}


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    model: Model,
    memory: Memory = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    context: Context = None,
    plan: PlanFile = None,
    weights: WeightFormat = None,
    attention: Attention = None,
    activations: Activations = None,
    device: Device = None,
    prefix_sharing: PrefixSharing = None,
    kv_store: KVStore = None,
    kv_retain: KVRetain = None,
    revision: Revision = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Talk with a model inside a memory budget. With --json: one message a line on standard input, one JSON document at the end.

    Example: tradespace chat smollm2-135m --memory 900MiB
    """
    import tradespace as ts

    notes = console(stderr=True)
    with ts.open(
        model,
        memory=memory,
        plan=plan,
        context=context,
        concurrency=1,
        weights=weights,
        attention=attention,
        activations=activations,
        device=device,
        prefix_sharing=prefix_sharing,
        kv_store=kv_store,
        kv_retain=kv_retain,
        revision=revision,
        offline=offline,
        progress=not json,
        say=(lambda line: None) if json else (lambda line: notes.print(escape(line), style="dim", soft_wrap=True)),
    ) as llm:
        params = llm.sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=(),
        )
        conversation = Conversation(llm, params, system, quiet=json)
        conversation.loop()
        if json:
            print_json({"model": model, "messages": conversation.messages, "report": llm.report().to_dict()})


class Conversation:
    """Messages so far, and what the next line typed does to them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, *, quiet: bool):
        self.llm, self.params, self.quiet = llm, params, quiet
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.notes = console(stderr=True)
        self.retries = 0

    def loop(self) -> None:
        """Reads lines until the end of the input or /exit."""
        if not self.quiet and sys.stdin.isatty():
            self.notes.print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves", style="dim")
        while True:
            try:
                line = self._read()
            except EOFError:
                if sys.stdin.isatty():
                    self.notes.print()  # the shell's prompt begins a line of its own
                break
            except InputError as error:
                self._complain(error)
                continue
            except KeyboardInterrupt:
                self.notes.print("\n(Ctrl-D or /exit leaves)", style="dim")
                continue
            if not line.strip():
                continue
            try:
                if not line.startswith("/"):
                    self.answer(line)
                elif not self.command(line):
                    break
            except TradespaceError as error:  # a wrong command or a full context ends neither the program nor the conversation
                self._complain(error)

    def _complain(self, error: TradespaceError) -> None:
        self.notes.print(f"error: {escape(str(error))}", style="red", soft_wrap=True)

    def _read(self) -> str:
        if sys.stdin.isatty() and not self.quiet:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` line editing and the lines typed before
            try:
                return input("> ")
            except UnicodeDecodeError as error:
                raise InputError(f"that line is not UTF-8 ({error.reason})") from error
        raw = sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        return decoded(raw, "that line").rstrip("\r\n")

    def answer(self, text: str) -> None:
        """One turn. An interrupted answer is kept as far as it came; one that fails leaves the conversation as it was."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self.llm.stream_chat(self.messages, self.params):
                pieces.append(piece)
                if not self.quiet:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            self.notes.print(" (stopped)", style="dim")
        except TradespaceError:
            self.messages.pop()
            raise
        if not self.quiet:
            sys.stdout.write("\n")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def command(self, line: str) -> bool:
        """Carries out a /command; False: leave."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit", "bye"):
            return False
        if name == "help":
            self.notes.print(HELP)
        elif name == "clear":
            self.messages = [message for message in self.messages if message["role"] == "system"]
        elif name in ("undo", "retry"):
            self._back(again=name == "retry")
        elif name == "system":
            self.messages = [{"role": "system", "content": rest}] if rest else []
        elif name == "set":
            self._set(*rest.partition(" ")[::2])
        elif name == "save":
            self._save(rest)
        elif name == "report":
            self.notes.print(report_table(self.llm.report()))
        else:
            raise InputError(f"unknown command /{name}. /help lists them")
        return True

    def _back(self, *, again: bool) -> None:
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise InputError("nothing has been asked yet")
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        if again:
            self.retries += 1
            kept = self.params
            self.params = replace(kept, seed=(kept.seed or 0) + self.retries)
            try:
                self.answer(question)
            finally:
                self.params = kept

    def _set(self, name: str, value: str) -> None:
        if name not in SETTABLE:
            raise InputError(f"/set knows {', '.join(SETTABLE)}; not '{name}'")
        try:
            self.params = replace(self.params, **{name: SETTABLE[name](value)})
        except ValueError:
            raise InputError(f"/set {name}: '{value}' is not a number") from None

    def _save(self, name: str) -> None:
        import json

        if not name:
            raise InputError("/save needs a file name")
        write_file(Path(name).expanduser(), json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", "/save")
        self.notes.print(f"saved {len(self.messages)} messages to {name}", style="dim")
