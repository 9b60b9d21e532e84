"""The application: paths, and how errors look. Everything that takes time happens in the engine's process or in the modules behind a path."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

import tradespace
from tradespace.errors import InputError, TradespaceError
from tradespace.measure.memory import process_bytes
from tradespace.server import chat, completions, responses
from tradespace.server.admission import QueueFull
from tradespace.server.asking import check_model
from tradespace.server.limits import Json, error_body
from tradespace.server.link import Unavailable
from tradespace.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, ResponsesRequest, TokenizeRequest
from tradespace.server.service import ClientGone, Service, error_response, off_loop

PAGE = Path(__file__).with_name("page.html")
_OBJECT = {"schema": {"type": "object", "additionalProperties": True}}
_ERROR = {
    "schema": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
}
_WHY = {
    400: "It makes no sense, or can never fit.", 408: "The body did not come.", 401: "No valid API key.", 404: "No such model.", 413: "The body is too large.",
    429: "The queue is full; Retry-After says when to try again.", 500: "The engine failed.", 503: "The engine is not there.", 504: "The deadline has passed.",
}  # fmt: skip


def _documented(*statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {status: {"description": _WHY[status], "content": {"application/json": _ERROR}} for status in statuses}
    content = {"application/json": _OBJECT} | ({"text/event-stream": {}} if stream else {})
    return {200: {"description": "Good.", "content": content}, **found}


_GENERATING = _documented(400, 401, 404, 408, 413, 429, 500, 503, 504, stream=True)
_PLAIN = _documented(400, 401, 404, 408, 413, 429, 500, 503)


def create_app(service: Service) -> FastAPI:
    """The ASGI application over a service whose engine it starts and ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.link.close()

    app = FastAPI(title="tradespace", version=tradespace.__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_errors(app)
    _add_generating(app, service)
    _add_watching(app, service)
    made = app.openapi

    def openapi() -> dict[str, Any]:
        found = made()
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # what does not fit the schema is answered with 400, as OpenAI does
                if service.settings.api_keys:
                    operation.setdefault("security", [{"key": []}])
        if service.settings.api_keys:
            found.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return found

    app.openapi = openapi
    return app


def _add_errors(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in (TradespaceError, QueueFull):
        app.add_exception_handler(kind, known)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        where, what = _wrong(error.errors())
        kind = request.headers.get("content-type", "")
        if not where and "json" not in kind:
            what = f"the body is not JSON, as its content-type says ({kind[:60] or 'none'}). Send JSON with content-type: application/json"
        return Json(error_body(f"{where}: {what}"[:1000] if where else what[:1000], "invalid_request_error", param=where or None), 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return Json(error_body(str(error.detail), "invalid_request_error"), error.status_code, headers=error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        traceback.print_exception(error, file=sys.stderr)
        return error_response(error)


def _wrong(errors: Sequence[Any]) -> tuple[str, str]:
    """Where a body does not fit, and what is wrong there. Of the kinds that a field may have, the one that comes furthest is meant."""
    first = next((error for error in errors if error["type"] == "extra_forbidden"), None) or max(errors, key=lambda error: len(error["loc"]))
    # pydantic names the kinds on its way: str, list[…], a model
    where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, int) or (part.islower() and part.isidentifier() and part != "str"))
    what = "this server has no such field" if first["type"] == "extra_forbidden" else first["msg"]
    return where, what


def _add_generating(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_GENERATING)
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        return await completions.complete(service, request, body)

    @app.post("/v1/chat/completions", responses=_GENERATING)
    async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
        return await chat.chat(service, request, body)

    @app.post("/v1/responses", responses=_GENERATING)
    async def create_response(request: Request, body: ResponsesRequest) -> Response:
        return await responses.respond(service, request, body)

    @app.get("/v1/models", responses=_documented(401))
    async def models() -> Response:
        return Json({"object": "list", "data": [_model(service, name) for name in service.settings.names]})

    @app.get("/v1/models/{name:path}", responses=_documented(401, 404))
    async def model(name: str) -> Response:
        check_model(name, service.settings.names)
        return Json(_model(service, name))

    @app.post("/tokenize", responses=_PLAIN)
    async def tokenize(body: TokenizeRequest) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise InputError("give prompt or messages")
        if body.prompt is not None:
            ids = await off_loop(len(body.prompt), service.tokenizer.encode, body.prompt, body.add_special_tokens)
        else:
            ids = list(await service.encode_chat(body.messages or [], body.tools or []))
        return Json({"tokens": ids, "count": len(ids), "max_model_len": service.link.limits.max_context})

    @app.post("/detokenize", responses=_PLAIN)
    async def detokenize(body: DetokenizeRequest) -> Response:
        decode = service.tokenizer.decode
        return Json({"prompt": await off_loop(len(body.tokens), lambda: decode(body.tokens, skip_special_tokens=False))})


def _model(service: Service, name: str) -> dict[str, Any]:
    length = None if service.link.ready is None else service.link.ready.limits.max_context
    return {"id": name, "object": "model", "created": service.started, "owned_by": "tradespace", "root": service.name, "max_model_len": length}


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": policy})

    @app.get("/health", responses=_documented(503))
    async def health() -> Response:
        if service.link.failure is not None or (service.link.ready is None and service.link.restarts):
            raise Unavailable(service.link.failure or "the engine's process has ended and is being started again")
        return Json({"status": "ok"})

    @app.get("/ready", responses=_documented(503))
    async def ready() -> Response:
        return Json({"status": "ready", "plan": service.ready.plan})

    @app.get("/version", responses=_documented())
    async def version() -> Response:
        return Json({"version": tradespace.__version__})

    @app.get("/status", responses=_documented(401, 503))
    async def status() -> Response:
        snapshot, link, front = await service.link.snapshot(), service.link, process_bytes()
        load = snapshot.load
        return Json(
            {
                "model": service.name, "plan": service.ready.plan, "chat": service.tokenizer.chat_template is not None,
                "memory": {
                    "budget_bytes": snapshot.budget_bytes + service.settings.outside_bytes, "now_bytes": snapshot.now_bytes + front,
                    "peak_bytes": snapshot.peak_bytes + service.settings.front_bytes, "front_bytes": front,
                },
                "ledger": [{"name": name, "predicted": predicted, "measured": measured} for name, predicted, measured in snapshot.ledger],
                "blocks": {"owners": snapshot.owners, "references": snapshot.blocks, "size": link.limits.block_size},
                "load": {
                    "running": load.running, "waiting": load.waiting + link.admission.num_waiting, "used_blocks": load.used_blocks,
                    "num_blocks": load.num_blocks, "tokens": load.step_tokens, "preemptions": load.preemptions,
                    "prefix_cache_queries": load.prefix_cache_queries, "prefix_cache_hits": load.prefix_cache_hits,
                },
            }
        )  # fmt: skip

    @app.get("/metrics", responses={200: {"description": "Prometheus.", "content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        try:
            snapshot = await asyncio.wait_for(service.link.snapshot(), 5)
        except (TradespaceError, TimeoutError):
            snapshot = None
        settings, waiting = service.settings, service.link.admission.num_waiting
        text = service.metrics.text(service.link.load, waiting, snapshot, settings.front_bytes, settings.outside_bytes)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
