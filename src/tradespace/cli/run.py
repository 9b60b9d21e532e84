"""`tradespace run`: prompts in, text out, inside the budget; then predicted against measured."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tradespace.cli.options import (
    Activations,
    Attention,
    AttentionPattern,
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
)
from tradespace.errors import InputError, TradespaceError

if TYPE_CHECKING:
    from tradespace.engine.beam import BeamOutput
    from tradespace.engine.request import SamplingParams
    from tradespace.llm import LLM
    from tradespace.measure.report import Report

MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option("--temperature", "--temp", min=0.0, help="0: greedy. Default: the model's own setting.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Keep the k likeliest tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Keep the likeliest tokens that sum to p.")]
MinP = Annotated[float | None, typer.Option("--min-p", min=0.0, max=1.0, help="Keep tokens at least this share of the likeliest one.")]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", "--repeat-penalty", help="Above 1: repeat less.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")]
Samples = Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt, each with a draw of its own; the prompt is computed once.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="A LoRA adapter as NAME=DIR, beside the weights and never merged; one for all prompts, or one for each in their order."),
]
Beams = Annotated[int, typer.Option("--beams", min=1, help="Search this many likeliest answers together (beam search) and print the best; 1: none.")]
LengthPenalty = Annotated[float, typer.Option("--length-penalty", help="With --beams: above 0 favours longer answers.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer before this text; may be given several times.")]


def register(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="One or many, answered together; '-' or none: standard input.")] = None,
    memory: Memory = None,
    prompt_file: Annotated[list[Path] | None, typer.Option("--prompt-file", "-f", help="A file that is one prompt; may be given several times.")] = None,
    max_tokens: MaxTokens = 128,
    n: Samples = 1,
    beams: Beams = 1,
    length_penalty: LengthPenalty = 1.0,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it stands instead of answering it through the chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message ahead of each prompt.")] = None,
    context: Context = None,
    plan: PlanFile = None,
    weights: WeightFormat = None,
    attention: Attention = None,
    attention_pattern: AttentionPattern = None,
    activations: Activations = None,
    device: Device = None,
    prefix_sharing: PrefixSharing = None,
    kv_store: KVStore = None,
    kv_retain: KVRetain = None,
    adapter: Adapters = None,
    report: Annotated[bool, typer.Option("--report", help="End with the table predicted | measured.")] = False,
    revision: Revision = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Answer prompts inside a memory budget.

    Example: tradespace run smollm2-135m --memory 900MiB "Why is the sky blue?"
    """
    import tradespace as ts

    texts = read_prompts(prompts or [], prompt_file or [])
    adapters = parse_adapters(adapter or [], len(texts))
    wanted = None
    if beams > 1:
        wanted = ts.BeamParams(num_beams=beams, max_tokens=max_tokens, length_penalty=length_penalty)
        refuse_sampling(n=n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, stop=stop)
    notes = console(stderr=True)
    with ts.open(
        model,
        memory=memory,
        plan=plan,
        context=context,
        concurrency=beams if beams > 1 else len(texts) * n,
        weights=weights,
        attention=attention,
        pattern=attention_pattern,
        activations=activations,
        device=device,
        prefix_sharing=prefix_sharing,
        kv_store=kv_store,
        kv_retain=kv_retain,
        adapters=adapters,
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
            stop=tuple(stop or ()),
            n=n,
        )
        names = list(adapters)
        each = [replace(params, adapter=names[number % len(names)] if names else None) for number in range(len(texts))]
        prepared = texts if raw else [llm.render(text, system=system) for text in texts]
        if wanted is not None:
            found = [llm.beam_search(prompt, wanted) for prompt in prepared]
            show_beams(texts, found, model=model, llm=llm, json=json)
            if report and not json:
                notes.print(report_table(llm.report()))
            return
        if json:
            completions = llm.generate(prepared, each)
            print_json({"model": model, "completions": completions, "report": llm.report().to_dict()})
            return
        if len(prepared) == n == 1:
            stream_to_terminal(llm, prepared[0], each[0])
        else:
            for number, completion in enumerate(llm.generate(prepared, each), 1):
                for sample in completion.samples:
                    name = f"{number}.{sample.sample + 1}" if n > 1 else f"{number}"
                    print(f"[{name}] {texts[number - 1].strip()[:80]}\n{sample.text}\n")
        if report:
            notes.print(report_table(llm.report()))


def parse_adapters(given: list[str], num_prompts: int) -> dict[str, Path]:
    """Folders by name of NAME=DIR words. Raises InputError for other words, and for a number of adapters that is neither one nor one a prompt."""
    found: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or not name or not folder or name in found:
            raise InputError(f"--adapter {word}: write NAME=DIR, each name once, such as --adapter tidy=run/adapter")
        found[name] = Path(folder)
    if len(found) > 1 and len(found) != num_prompts:
        raise InputError(f"{len(found)} adapters for {num_prompts} prompts. Give one adapter for all prompts, or one for each, in their order")
    return found


def refuse_sampling(**settings: object) -> None:
    """Raises InputError for a setting that draws tokens: a beam search takes the likeliest."""
    given = next((name for name, value in settings.items() if value not in (None, [], 1 if name == "n" else None)), None)
    if given is not None:
        raise InputError(f"--{given.replace('_', '-')} and --beams: a beam search draws nothing, it keeps the likeliest answers. Leave one of the two away")


def show_beams(texts: list[str], found: list[list[BeamOutput]], *, model: str, llm: LLM, json: bool) -> None:
    """The best answer to each prompt; as JSON all of them with their scores."""
    if json:
        print_json({"model": model, "beams": found, "report": llm.report().to_dict()})
        return
    for number, (text, outputs) in enumerate(zip(texts, found, strict=True), 1):
        print(f"[{number}] {text.strip()[:80]}\n{outputs[0].text}\n" if len(texts) > 1 else outputs[0].text)


def stream_to_terminal(llm: LLM, prompt: str | list[int], params: SamplingParams) -> None:
    """Text as it is generated, then a line end; one, too, after an answer that was cut short."""
    has_begun = False
    try:
        for piece in llm.stream(prompt, params):
            has_begun = True
            sys.stdout.write(piece)
            sys.stdout.flush()
    except (KeyboardInterrupt, TradespaceError):
        if has_begun:
            sys.stdout.write("\n")
            sys.stdout.flush()
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()


def read_prompts(arguments: list[str], files: list[Path]) -> list[str]:
    """The prompts of the command line, of files, or of standard input. Raises InputError for what is empty, missing or not UTF-8."""
    # an argument's bytes as they were typed: Python has made surrogates of those that are not UTF-8
    texts = [_read_stdin() if argument == "-" else decoded(os.fsencode(argument), "the prompt") for argument in arguments]
    for path in files:
        try:
            texts.append(decoded(path.read_bytes(), str(path)))
        except OSError as error:
            raise InputError(f"cannot read the prompt file {path}: {error.strerror}") from error
    if not texts:
        if sys.stdin.isatty():
            raise InputError("no prompt. Give one in quotes, --prompt-file FILE, or pipe text in: echo 'Hello' | tradespace run MODEL")
        texts.append(_read_stdin())
    for text in texts:
        if not text:
            raise InputError("the prompt is empty (0 bytes). Give at least one character")
    return texts


def _read_stdin() -> str:
    return decoded(sys.stdin.buffer.read(), "standard input")


def decoded(raw: bytes, where: str) -> str:
    """Bytes as text. Raises InputError that says where they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}. Convert it first, e.g. with iconv -t utf-8") from error


def report_table(report: Report) -> Group:
    """The table predicted | measured, and the facts that it holds for."""
    table = Table("", title=escape(report.title), title_justify="left")
    for column in ("predicted", "measured", "difference"):
        table.add_column(column, justify="right")
    for row in report.rows():
        table.add_row(*row)
    return Group(table, *(Text(f"{name}: {value}") for name, value in report.facts))
