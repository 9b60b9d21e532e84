"""Start, serve, drain: the process that `tradespace serve` is.

This process speaks HTTP and holds no weights. What it costs (measured once everything is loaded) and a reserve for what requests hold here come off the budget;
the engine's process gets the rest, and both together stay inside it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import uvicorn

from tradespace import api
from tradespace.errors import BudgetError
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.memory import process_bytes
from tradespace.server.app import create_app
from tradespace.server.limits import HELD_PER_BYTE, ApiKeys, Limited
from tradespace.server.link import Link, Unavailable
from tradespace.server.messages import GRAMMAR_BYTES
from tradespace.server.metrics import Metrics
from tradespace.server.protocol import guarded
from tradespace.server.service import Service, Settings
from tradespace.units import KiB, MiB, format_bytes

CONNECTION_BYTES = 32 * KiB  # with a short request, its answer, and all that stands between
WATCHERS = 512  # connections beyond those whose requests may wait


class Reserve:
    """Memory that connections will take, resident from the start, so that what a crowd adds is there before it comes and stays when it goes.

    Python keeps small objects in arenas of 1 MiB and returns one only when nothing in it is left, which after a crowd is never. Here as many are taken as
    planned, and one object in each is kept.
    """

    def __init__(self, size_bytes: int):
        blocks = [bytes(448) for _ in range(size_bytes // 512)]  # with its head a block takes 481 bytes of a class of 496: 32 to a page of 16 KiB
        self._kept = blocks[:: MiB // 4 // 512]

    def keep(self) -> int:
        """How many objects hold it."""
        return len(self._kept)


class Draining(uvicorn.Server):
    """uvicorn, which on the first SIGTERM or SIGINT refuses new requests and lets those in flight end, for at most `grace_s`."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        if not self.service.draining:
            self.service.draining = True
            asyncio.get_event_loop().call_soon_threadsafe(lambda: setattr(self, "_drain", asyncio.ensure_future(self._end_late())))
        super().handle_exit(sig, frame)

    async def _end_late(self) -> None:
        await asyncio.sleep(self.service.settings.grace_s)
        self.service.link.end_all(Unavailable("the server stops, and its grace period is over"))


def serve(settings: Settings, options: Mapping[str, Any], *, host: str, port: int) -> None:
    """Serve until told to stop. Raises what building the engine raises, before a port is opened."""
    files = resolve(settings.model, revision=options.get("revision"), offline=bool(options.get("offline")), progress=sys.stderr.isatty())
    tokenizer = Tokenizer.from_files(files)
    asyncio.run(_serve(settings, options, tokenizer, host, port))


async def _serve(settings: Settings, options: Mapping[str, Any], tokenizer: Tokenizer, host: str, port: int) -> None:
    budget = api.budget_bytes(options.get("memory"), api.find_machine(None))
    connections = settings.max_queue + WATCHERS
    reserve = Reserve(connections * CONNECTION_BYTES)
    held_bytes = HELD_PER_BYTE * settings.max_body_bytes
    settings = replace(settings, front_bytes=process_bytes() + held_bytes, grammar_bytes=GRAMMAR_BYTES if settings.grammars else 0)
    left_bytes = budget - settings.outside_bytes
    said = f"{format_bytes(settings.front_bytes)} for HTTP and {format_bytes(settings.grammar_bytes)} for grammars"
    if left_bytes <= 0:
        raise BudgetError(
            f"{said} leave nothing of the budget of {format_bytes(budget)}. Give more --memory, or --no-grammars, a smaller --max-queue or --max-body",
            need_bytes=settings.outside_bytes, have_bytes=budget,
        )  # fmt: skip
    print(f"budget: {format_bytes(budget)}, of which {said}, and {format_bytes(left_bytes)} for the engine", file=sys.stderr)
    metrics = Metrics(prefix=settings.metrics_prefix, model=settings.names[0])
    link = Link(settings.model, {**options, "memory": left_bytes}, max_queue=settings.max_queue, on_end=metrics.on_end, on_progress=metrics.on_progress)
    service = Service(settings, tokenizer, link, metrics)
    app = Limited(
        create_app(service), keys=ApiKeys(settings.api_keys), max_body_bytes=settings.max_body_bytes, max_depth=settings.max_depth, held_bytes=held_bytes
    )
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=round(settings.grace_s) + 5,
        h11_max_incomplete_event_size=65536, http=guarded(connections), ws="none", backlog=4096,
        timeout_keep_alive=30, server_header=False,
    )  # fmt: skip
    starting = asyncio.ensure_future(link.start())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, starting.cancel)
    try:
        await starting
    except asyncio.CancelledError:
        await link.close()
        return
    except BaseException:
        await link.close()
        raise
    loop.remove_signal_handler(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again once it has drained: that is no reason to end by it
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {settings.names[0]} at http://{shown}:{port} (page at /, OpenAI at /v1)", file=sys.stderr, flush=True)
    reserve.keep()
    await Draining(config, service).serve()
    await link.close()
