# SPDX-License-Identifier: BSD-3-Clause
"""The front of a cluster: knows which adapters there are, and sends every request to a replica.

What it knows of an adapter travels with the requests for it, so replicas need not be told of changes. Knows nothing of Ray.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from QEfficient.serve.calls import Call, Known
from QEfficient.serve.config import Places
from QEfficient.serve.failures import Refusal
from QEfficient.serve.logs import log
from QEfficient.serve.metrics import METRICS_TYPE, merged

LOAD, UNLOAD, METRICS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics"
_RETRY_SECONDS = 1

Send = Callable[[Call, str], AsyncIterator[Any]]
"""Lets a replica answer a call, preferably one that has the named adapter; yields ASGI messages."""

AskAll = Callable[[], Awaitable[Sequence[tuple[str, str]]]]
"""Returns every replica's name and its metrics."""


class Front:
    """Knows the adapters, and sends every request to a replica.

    Args:
        send: To the replicas.
        ask_all: For their metrics.
        adapters: Those known from the start.
        places: Where others may come from.
    """

    def __init__(self, send: Send, ask_all: AskAll, adapters: Mapping[str, str | Path], places: Places) -> None:
        self._send, self._ask_all, self._places = send, ask_all, places
        self._generations = itertools.count(1)
        self._known = {n: Known(str(p), next(self._generations)) for n, p in adapters.items()}
        self._changing = asyncio.Lock()

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        if request.url.path == METRICS and request.method == "GET":
            return Response(merged(dict(await self._ask_all())), media_type=METRICS_TYPE)
        key = request.scope.get("state", {}).get("key")
        call = Call(
            method=request.method,
            path=request.url.path,
            query=request.scope["query_string"],
            headers=tuple(request.scope["headers"]),
            body=await request.body(),
            key=key,
        )
        if call.path in (LOAD, UNLOAD):
            async with self._changing:
                return await self._change(call)
        name = _field(call.body, "model") if call.method == "POST" else ""
        if not name:
            return await self._forward(replace(call, adapters=dict(self._known), whole=True), "")
        return await self._forward(replace(call, adapters={name: self._known.get(name)}), name)

    async def _change(self, call: Call) -> Response:
        """Let a replica load or unload an adapter; if it does, it is so for all."""
        name, path = _field(call.body, "lora_name"), _field(call.body, "lora_path")
        generation = next(self._generations)
        loads = (name, generation) if call.path == LOAD else None
        answer = await self._forward(replace(call, adapters={name: self._known.get(name)}, loads=loads), name)
        if answer.status_code == 200 and loads is None:
            self._known.pop(name, None)
        elif answer.status_code == 200:
            self._known[name] = Known(str(self._places.check(path)), generation)
        return answer

    async def _forward(self, call: Call, name: str) -> Response:
        messages = self._send(call, name)
        try:
            first = await anext(messages)
        except Exception as e:  # a replica that died, or none that is free: whatever Ray says of it
            refusal = Refusal(
                503, "no replica could answer; try again", code="no_replica", retry_seconds=_RETRY_SECONDS
            )
            log("no replica", error=type(e).__name__)
            return JSONResponse(refusal.body, 503, headers=refusal.headers)

        async def body() -> AsyncIterator[bytes]:
            async for message in messages:
                yield message.get("body", b"")

        response = StreamingResponse(body(), first["status"])
        response.raw_headers = list(first["headers"])
        return response


def _field(body: bytes, name: str) -> str:
    """Return a text of a JSON body; empty if there is none, for the replica to say what is wrong."""
    try:
        found = json.loads(body)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""
