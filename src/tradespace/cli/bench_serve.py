"""`tradespace bench serve`: load on an OpenAI-compatible server, ours or another, and what its users would have felt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tradespace.cli.evaluate import progress_bar
from tradespace.cli.options import Json, console, print_json
from tradespace.errors import InputError

ENDPOINTS = ("completions", "chat")


def register(bench: typer.Typer) -> None:
    bench.command("serve")(serve)


def serve(
    url: Annotated[str, typer.Option("--url", help="Where the server listens.")] = "http://127.0.0.1:8000",
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Open loop: arrivals and lengths of a CSV with TIMESTAMP, ContextTokens, GeneratedTokens.")
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", min=0.001, help="Open loop: so many requests a second, Poisson.")] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="Closed loop: so many clients, each asks again when it has its answer.")
    ] = None,
    requests: Annotated[int | None, typer.Option("--requests", "-r", min=1, help="How many. Default: 64, or the whole trace.")] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of a prompt.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens of an answer.")] = 64,
    spread: Annotated[bool, typer.Option("--spread", help="Lengths uniform from half to one and a half of these.")] = False,
    max_prompt: Annotated[int | None, typer.Option("--max-prompt", min=1, help="Cut a trace's prompts to so many tokens.")] = None,
    max_output: Annotated[int | None, typer.Option("--max-output", min=1, help="Cut a trace's answers to so many tokens.")] = None,
    speedup: Annotated[float, typer.Option("--speedup", min=0.001, help="A trace's arrivals so many times as fast.")] = 1.0,
    slo_ttft: Annotated[
        float | None, typer.Option("--slo-ttft", min=0.0, help="Goodput counts answers whose first token took at most so many seconds.")
    ] = None,
    slo_tpot: Annotated[float | None, typer.Option("--slo-tpot", min=0.0, help="… and whose later tokens took at most so many seconds each.")] = None,
    endpoint: Annotated[str, typer.Option("--endpoint", help="completions (prompts of random token ids) or chat (prompts of common words).")] = "completions",
    model: Annotated[str | None, typer.Option("--model", help="Default: the first that the server offers.")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="A key of the server. Or TRADESPACE_API_KEY.")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Streamed answers, or whole ones (no TTFT, TPOT, ITL).")] = True,
    any_length: Annotated[bool, typer.Option("--any-length", help="Send no ignore_eos: answers end where the model ends them.")] = False,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Requests before, one after the other, that are not counted.")] = 2,
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds after which a request counts as hung.")] = 600.0,
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals, lengths and prompts.")] = 0,
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="A .json file for the record, a .png for the picture; may be given twice.")
    ] = None,
    json: Json = False,
) -> None:
    """Load a server, open or closed loop: TTFT, TPOT, ITL and end-to-end percentiles, goodput under an SLO, errors by kind.

    Example: tradespace bench serve --url http://127.0.0.1:8000 --concurrency 8 --prompt 128 --tokens 64

    Trace:   tradespace bench serve --trace AzureLLMInferenceTrace_conv.csv --speedup 2 --slo-ttft 1 --slo-tpot 0.05 -o load.png
    """
    from tradespace.lab.serving.asking import Target
    from tradespace.lab.serving.command import Load, bench_serve, find_model, record_of, summary_table
    from tradespace.lab.serving.http import Address
    from tradespace.measure.record import write_record

    files = {path.suffix: path for path in output or ()}
    for path in output or ():
        if path.suffix not in (".json", ".png") or path.is_dir():
            raise InputError(f"--output {path}: give a file that ends in .json (the record) or .png (the picture)")
    if endpoint not in ENDPOINTS:
        raise InputError(f"--endpoint {endpoint}: known are {', '.join(ENDPOINTS)}")
    load = Load(
        trace=trace, rate=rate, concurrency=concurrency, requests=requests, prompt=prompt, output=tokens, spread=spread, max_prompt=max_prompt,
        max_output=max_output, speedup=speedup, warmup=warmup, seed=seed,
    )  # fmt: skip
    address = Address.of(url)
    key = api_key or os.environ.get("TRADESPACE_API_KEY") or None
    target = Target(
        address=address, model=model or find_model(address, api_key=key), endpoint=endpoint, stream=stream, exact_length=not any_length, api_key=key,
        timeout_s=timeout,
    )  # fmt: skip
    with progress_bar(show=not json) as on_progress:
        run, row = bench_serve(load, target, slo_ttft_s=slo_ttft, slo_tpot_s=slo_tpot, tell=lambda done, total: on_progress("requests", done, total))
    if ".png" in files:
        from tradespace.lab.serving.plot import draw_run

        files[".png"].parent.mkdir(parents=True, exist_ok=True)
        draw_run(run, row, files[".png"])
    record = record_of(run, row, notes=f"a connection for each request; {'token ids' if endpoint == 'completions' else 'words'} drawn anew for each prompt")
    if ".json" in files:
        write_record(files[".json"], record)
    if json:
        print_json(record)
        return
    out = console()
    table = summary_table(row, load.describe, lambda line: out.print(escape(line), soft_wrap=True))
    out.print(table)
