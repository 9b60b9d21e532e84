"""The options that `train`, `finetune` and `distill` have in common, written once: a function whose parameters they are, and what adds them to a command."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tradespace.cli.options import Device, Memory, Offline
from tradespace.errors import InputError

if TYPE_CHECKING:
    from tradespace.tuning import Settings


def settings_of(
    context: Annotated[int, typer.Option("--context", "-c", min=2, help="Tokens of a sequence.")] = 512,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences of a step; micro-batches are planned.")] = 8,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps to take. Default: --epochs.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, help="Passes over the data, where --steps is not given.")] = 1.0,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    schedule: Annotated[str, typer.Option("--schedule", help="constant, linear or cosine.")] = "cosine",
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps over which the rate rises.")] = 0,
    decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="Decoupled, of matrices alone.")] = 0.0,
    clip: Annotated[float, typer.Option("--clip", min=0.0, help="Most the gradients' norm may be; 0: anything. Needs gradients in memory.")] = 0.0,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="adamw, adamw8bit, adafactor, sgd; paged-adamw, paged-adamw8bit on a card. Default: the planner's choice.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="How the base is held: fp32, bf16; with qlora nf4, int8, int4. Default: the planner's choice.")
    ] = None,
    checkpointing: Annotated[
        str | None, typer.Option("--checkpointing", help="none, selective, full, every-K, offload, or full:4,none:26. Default: planned to the byte.")
    ] = None,
    fused: Annotated[bool | None, typer.Option("--fused/--no-fused", help="Update each parameter within the backward pass. Default: where it can be.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights and of the data's order.")] = 0,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints; the last two are kept.")] = 100,
    time_limit: Annotated[str | None, typer.Option("--time-limit", help="Such as 90s, 30m or 2h: a checkpoint is written and the run ends.")] = None,
    memory: Memory = None,
    device: Device = None,
    data_parallel: Annotated[
        int | None, typer.Option("--data-parallel", min=1, help="Ranks that share the batch and hold parts of everything (FSDP2); torchrun starts them.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", min=1, help="Ranks that share heads and feed-forward; torchrun starts them. Default: 1.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output, bit for bit.")] = False,
    offline: Offline = False,
) -> Settings:
    """How to learn, from the flags. Raises InputError for a time limit that is none."""
    from tradespace.tuning import Settings

    return Settings(
        context=context, batch=batch, steps=steps, epochs=epochs, lr=lr, schedule=schedule, warmup=warmup, decay=decay, clip=clip, optimizer=optimizer,
        weights=weights, checkpointing=checkpointing, fused=fused, seed=seed, save_every=save_every, time_limit_s=parse_duration(time_limit), memory=memory,
        resume=resume, offline=offline, data_parallel=data_parallel, tensor_parallel=tensor_parallel, device=device,
    )  # fmt: skip


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the flags of `settings_of` where its parameter `settings` stands; it gets what that returns."""
    names = {"Settings": Any}  # imported where it is used: torch comes with it
    shared = inspect.signature(settings_of, eval_str=True, locals=names).parameters
    own = inspect.signature(command, eval_str=True, locals=names)

    @wraps(command)
    def called(**given: Any) -> None:
        command(**{name: value for name, value in given.items() if name not in shared}, settings=settings_of(**{name: given[name] for name in shared}))

    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += shared.values() if parameter.name == "settings" else [parameter]
    # keywords alone: flags follow each other in any order, with and without defaults
    called.__signature__ = own.replace(parameters=[each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters])  # pyright: ignore
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    return called


def parse_duration(text: str | None) -> float | None:
    """Seconds of 90s, 30m, 2h or 45.

    >>> parse_duration("30m"), parse_duration("45"), parse_duration(None)
    (1800.0, 45.0, None)
    """
    if text is None:
        return None
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if matched is None or float(matched[1]) <= 0:
        raise InputError(f"--time-limit '{text}': write for example 90s, 30m or 2h")
    return float(matched[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[matched[2]]
