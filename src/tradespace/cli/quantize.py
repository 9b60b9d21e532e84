"""`tradespace quantize`: a checkpoint in fewer bytes, by a method or for a budget, inside a stated memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tradespace.cli.evaluate import listed, progress_bar
from tradespace.cli.options import Json, Memory, Model, Offline, Revision, console, print_json
from tradespace.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tradespace.quantizing import Quantized

_METHODS = "rtn, rtn-search, gptq, gptaq, awq, awq-gptq, smoothquant, smooth-search, hadamard, hadamard-gptq, hadamard-smooth."


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder (or, with --to gguf, the file) to write; it appears whole or not at all.")],
    fmt: Annotated[str | None, typer.Option("--format", help="One format for all linears: int4, int3, int2, int8, nf4, fp8, e8, w8a8, q4_0 …")] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", help="Weights that share a scale, for int4, int3 and int2: 32, 64 or 128.")] = None,
    method: Annotated[str | None, typer.Option("--method", help=f"{_METHODS} Default: gptq with a text.")] = None,
    total: Annotated[str | None, typer.Option("--bytes", help="A budget for all weights, such as 60MiB: formats are chosen per matrix.")] = None,
    bits: Annotated[float | None, typer.Option("--bits", min=0.1, max=32.0, help="The same, as bits per parameter.")] = None,
    formats: Annotated[str | None, typer.Option("--formats", help="With --bytes or --bits: what to choose from, with commas.")] = None,
    embed: Annotated[str | None, typer.Option("--embed", help="With --format: how embedding and head are held. Default: 16 bits.")] = None,
    calibrate: Annotated[Path | None, typer.Option("--calibrate", help="A UTF-8 text of the kind that the model is for.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of that text to learn from.")] = 128,
    context: Annotated[int, typer.Option("--context", "-c", min=2, help="Tokens of a window.")] = 2048,
    alpha: Annotated[float | None, typer.Option("--alpha", min=0.0, max=1.0, help="SmoothQuant's balance. Default: searched for.")] = None,
    to: Annotated[
        str, typer.Option("--to", help="compressed-tensors (a folder that transformers and vLLM open) or gguf (a file that llama.cpp opens).")
    ] = "compressed-tensors",
    memory: Memory = None,
    seed: Annotated[int, typer.Option("--seed", help="Of samples and rotations. Same seed, same bytes.")] = 0,
    revision: Revision = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Quantize MODEL layer by layer: never more in memory than --memory; killed, it goes on where it stopped.

    Example: tradespace quantize smollm2-135m -o smollm2-int4 --format int4 --group-size 64 --calibrate text.txt

    Budget:  tradespace quantize smollm2-135m -o smollm2-60 --bytes 60MiB --calibrate text.txt
    """
    import tradespace as ts

    with progress_bar(show=not json) as on_progress:
        found = ts.quantize(
            model,
            output,
            format=fmt,
            group_size=group_size,
            method=method,
            bytes=total,
            bits=bits,
            formats=listed(formats),
            embed=embed,
            calibrate=calibrate,
            samples=samples,
            context=context,
            alpha=alpha,
            to=to,  # pyright: ignore[reportArgumentType] (checked there)
            memory=memory,
            seed=seed,
            revision=revision,
            offline=offline,
            on_progress=on_progress,
        )
    print_json(found) if json else console().print(summary(found))


def summary(found: Quantized) -> Table:
    """What was written, for the terminal."""
    table = Table(title=f"{escape(found.model)} → {escape(found.folder)}", title_justify="left", show_header=False)
    table.add_row("method", found.method)
    table.add_row("formats", _shortened(found.formats))
    table.add_row("weights", f"{format_bytes(found.weight_bytes)}, {found.bits_per_weight:.3f} bits a parameter ({format_bytes(found.bf16_bytes)} in bf16)")
    if found.expected_kl is not None:
        table.add_row("expected KL", f"{found.expected_kl:.4f} nats per token: the sum of what each matrix costs alone, on the calibration text")
    if found.errors:
        worst = max(found.errors, key=lambda name: found.errors[name])
        table.add_row("output error", f"mean {sum(found.errors.values()) / len(found.errors):.2%}, largest {found.errors[worst]:.2%} in {worst}")
    kept = "kept" if found.peak_bytes <= found.memory_bytes else "EXCEEDED"
    table.add_row("memory", f"{format_bytes(found.peak_bytes)} at the peak, budget {format_bytes(found.memory_bytes)} ({kept})")
    table.add_row("time", format_seconds(found.seconds) + (", with an earlier run's work" if found.resumed else ""))
    return table


def _shortened(formats: str, most: int = 300) -> str:
    return formats if len(formats) <= most else formats[:most].rsplit(",", 1)[0] + ", …"
