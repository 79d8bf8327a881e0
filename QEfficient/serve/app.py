# SPDX-License-Identifier: BSD-3-Clause
"""The routes: OpenAI's API, vLLM's two for adapters, health, metrics and the page."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from QEfficient.contract import BASE
from QEfficient.errors import QEffError
from QEfficient.serve.access import Door
from QEfficient.serve.config import Key
from QEfficient.serve.failures import Refusal, refusal_of
from QEfficient.serve.invalid import refusal_of_body
from QEfficient.serve.logs import log
from QEfficient.serve.metrics import METRICS_TYPE
from QEfficient.serve.responses import answer
from QEfficient.serve.schemas import ChatRequest, CompletionRequest, ErrorAnswer, LoadRequest, UnloadRequest
from QEfficient.serve.server import Server

PAGE = Path(__file__).with_name("page.html")
_REFUSED = (400, 401, 403, 404, 408, 413, 422, 429, 503)


def create_app(server: Server, *, door: bool = True) -> FastAPI:
    """Return the application of ``server``; its end closes the server.

    Args:
        server: What answers.
        door: Look at keys and sizes; without, somebody in front has done so.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        log("ready", base=server.base, adapters=len(server.registry.names))
        yield
        server.close()
        log("closed")

    app = FastAPI(title="Efficient Transformers", version="1", lifespan=lifespan, redoc_url=None, docs_url=None)
    app.state.server = server
    refused: dict[int | str, dict[str, Any]] = {s: {"model": ErrorAnswer} for s in _REFUSED}
    _add_openai(app, server, refused)
    _add_adapters(app, server, refused)
    _add_operations(app, server)
    app.add_exception_handler(QEffError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(Exception, _answer_error)
    if door:
        app.add_middleware(Door, keys=server.keys, limits=server.limits, on_refusal=server.metrics.count_refusal)
    return app


def _add_openai(app: FastAPI, server: Server, refused: dict[int | str, dict[str, Any]]) -> None:
    @app.get("/v1/models", responses=refused)
    async def list_models(request: Request) -> dict[str, Any]:
        """List the base and the adapters that may be asked for."""
        models = server.models(_key(request))
        return {"object": "list", "data": [_model(server, name, parent) for name, parent in models]}

    @app.get("/v1/models/{model:path}", responses=refused)
    async def get_model(model: str, request: Request) -> dict[str, Any]:
        """Describe one of them; the base may be called what the server was started with."""
        wanted = server.name_of(model, _key(request))
        for name, parent in server.models(_key(request)):
            if name == wanted:
                return _model(server, name, parent)
        raise Refusal(404, "no such model", code="model_not_found", param="model")

    @app.post("/v1/chat/completions", responses=refused)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        return await answer(server, body, request, _key(request))

    @app.post("/v1/completions", responses=refused)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        return await answer(server, body, request, _key(request))


def _add_adapters(app: FastAPI, server: Server, refused: dict[int | str, dict[str, Any]]) -> None:
    @app.post("/v1/load_lora_adapter", responses=refused)
    async def load(body: LoadRequest, request: Request) -> PlainTextResponse:
        """Check an adapter and load it; with ``load_inplace`` it may replace one of its name."""
        _need_admin(server, _key(request))
        await server.load(body.lora_name, body.lora_path, replace=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", responses=refused)
    async def unload(body: UnloadRequest, request: Request) -> PlainTextResponse:
        """Forget an adapter; requests that run finish with it."""
        _need_admin(server, _key(request))
        server.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.get("/v1/adapters", responses=refused)
    async def adapters(request: Request) -> dict[str, Any]:
        """Tell the state of every adapter, what the checks said, and how busy the engine is."""
        allowed = {name for name, _ in server.models(_key(request))}
        stats, registry, memory = server.lanes.stats(), server.registry, server.lanes.memory()
        key = _key(request)
        shown = [v for v in registry.entries() if v.name in allowed or key is None or not key.models]
        return {
            "adapters": [
                {
                    "name": v.name,
                    "state": v.state,
                    "version": v.resident.version if v.resident is not None else "",
                    "bytes": v.resident.bytes if v.resident is not None and not v.resident.gone else 0,
                    "running": v.resident.uses if v.resident is not None else 0,
                    "loads": v.loads,
                    "load_seconds": v.load_seconds,
                    "refused": v.refused,
                    "warnings": v.warnings,
                }
                for v in shown
            ],
            "engine": {"slots": stats.slots, "active": stats.active, "waiting": stats.waiting},
            "memory": {"adapters": memory["bytes"], "limit": memory["limit"]},
        }


def _add_operations(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        """Tell whether new requests are taken."""
        status = "draining" if server.draining else "ok"
        return JSONResponse({"status": status}, 503 if server.draining else 200)

    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """Tell Prometheus, but nobody who may not know every adapter."""
        key = _key(request)
        if key is not None and key.models:
            raise Refusal(403, "a key for some models only may not see the metrics, which are of all", code="not_all")
        return Response(server.metrics.text(), media_type=METRICS_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """Return the page; it needs nothing from elsewhere, and may not ask for it."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"content-security-policy": policy})


def _key(request: Request) -> Key | None:
    key: Key | None = request.scope.get("state", {}).get("key")
    return key


def _need_admin(server: Server, key: Key | None) -> None:
    if server.keys.known and (key is None or not key.admin):
        raise Refusal(403, "this key may not load or unload adapters", code="not_admin")


def _model(server: Server, name: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "qefficient",
        "parent": parent,
        "root": server.base if name == BASE else name,
        "max_model_len": server.ctx_len,
    }


async def _answer_error(request: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    if refusal.status >= 500 and not isinstance(error, QEffError):
        log("request failed", level=logging.ERROR, exception=error, path=request.url.path)
    return _answer(request, refusal)


async def _answer_http(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = {404: "no such path", 405: "this path takes another method"}.get(status, "invalid request")
    return _answer(request, Refusal(status, message), dict(getattr(error, "headers", None) or {}))


async def _answer_invalid(request: Request, error: Exception) -> Response:
    errors, body = (error.errors(), error.body) if isinstance(error, RequestValidationError) else ((), None)
    return _answer(request, refusal_of_body(errors, body))


def _answer(request: Request, refusal: Refusal, headers: dict[str, str] | None = None) -> Response:
    """Count, write down and send a refusal."""
    key = _key(request)
    request.app.state.server.metrics.count_refusal(refusal.status)
    log(
        "refused",
        key=key.name if key else None,
        path=request.url.path,
        status=refusal.status,
        code=refusal.code,
        reason=str(refusal),
    )
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers | (headers or {}))
