"""`tradespace serve`: an OpenAI-compatible server inside a memory budget."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tradespace.cli.options import (
    Activations,
    Attention,
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
)
from tradespace.errors import InputError, TradespaceError
from tradespace.units import parse_bytes


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


# what goes to `ts.open` as it is
OPENED = (
    "memory",
    "plan",
    "context",
    "device",
    "weights",
    "attention",
    "activations",
    "prefix_sharing",
    "kv_store",
    "kv_retain",
    "goal",
    "revision",
    "offline",
)


def serve(
    context_: typer.Context,
    model: Model,
    memory: Memory = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at. Anything but loopback lets others in, and is warned about.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen at.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option("--api-key", help="A key that clients must show; several times for several. Or TRADESPACE_API_KEY.")
    ] = None,
    context: Annotated[int | None, typer.Option("--max-model-len", "--context", "-c", min=1, help="Most tokens of prompt and answer together.")] = None,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", min=1, max=1024, help="Sequences that run at once.")] = 8,
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Requests that may wait; more are answered 429.")] = 1024,
    served_name: Annotated[list[str] | None, typer.Option("--served-model-name", help="Names that clients may ask for; the first is the answer's.")] = None,
    timeout: Annotated[float | None, typer.Option("--request-timeout", min=0.001, help="Most seconds of a request.")] = None,
    grace: Annotated[float, typer.Option("--grace", min=0.0, help="Seconds that requests get to end after SIGTERM.")] = 30.0,
    max_body: Annotated[str, typer.Option("--max-body", help="Most bytes of a request.")] = "2MiB",
    grammars: Annotated[
        bool, typer.Option("--grammars/--no-grammars", help="Whether outputs can be bound to a schema, regex or grammar; that takes 176 MiB of the budget.")
    ] = True,
    tool_parser: Annotated[str, typer.Option("--tool-parser", help="How the model writes calls: auto, hermes, qwen, llama.")] = "auto",
    tool_prompt: Annotated[
        bool, typer.Option("--tool-prompt", help="Tell the model of its tools in a system message where its chat template has no place for them.")
    ] = False,
    metrics_prefix: Annotated[str, typer.Option("--metrics-prefix", help="Prefix of the metrics' names.")] = "vllm",
    plan: PlanFile = None,
    weights: WeightFormat = None,
    attention: Attention = None,
    activations: Activations = None,
    device: Device = None,
    prefix_sharing: PrefixSharing = None,
    kv_store: KVStore = None,
    kv_retain: KVRetain = None,
    goal: Annotated[str, typer.Option("--goal", help="latency or throughput.")] = "throughput",
    revision: Revision = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Serve a model to OpenAI's clients, inside a memory budget. With --json errors at the start are one JSON document.

    Example: tradespace serve smollm2-135m --memory 1GiB --port 8000
    """
    values: dict[str, Any] = {name: value for name, value in context_.params.items() if name not in ("context_", "json")}
    try:
        from tradespace.server.log import protect_log
        from tradespace.server.running import serve as run
        from tradespace.server.service import Settings
    except ModuleNotFoundError as error:
        raise TradespaceError(f"serving needs {error.name}, which is not installed. Run: pip install 'tradespace[serve]'") from error
    protect_log()
    keys = tuple(values["api_key"] or ())
    if any(not key for key in keys):
        raise InputError("--api-key is empty. Give a key, or leave the flag away")
    if values["tool_parser"] not in ("auto", "hermes", "qwen", "llama"):
        raise InputError(f"--tool-parser {values['tool_parser']} is unknown. Known: auto, hermes, qwen, llama")
    if not _is_loopback(values["host"]):
        print(
            f"warning: {values['host']} can be reached from other machines" + ("" if keys else ", and no --api-key is set: anybody may use this server"),
            file=sys.stderr,
        )
    settings = Settings(
        model=values["model"], names=tuple(values["served_name"] or (Path(values["model"]).name or values["model"],)), api_keys=keys,
        max_queue=values["max_queue"], max_body_bytes=parse_bytes(values["max_body"]), timeout_s=values["timeout"], grace_s=values["grace"],
        tool_style=values["tool_parser"], tool_prompt=values["tool_prompt"], metrics_prefix=values["metrics_prefix"], grammars=values["grammars"],
    )  # fmt: skip
    options = {name: values[name] for name in OPENED}
    run(settings, {**options, "concurrency": values["max_num_seqs"]}, host=values["host"], port=values["port"])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
