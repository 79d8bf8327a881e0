# SPDX-License-Identifier: BSD-3-Clause
"""A job's answers on their way over HTTP, streamed or whole; a client that goes away ends its job."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from QEfficient.serve.bodies import Shape
from QEfficient.serve.completions import Answer, Piece
from QEfficient.serve.config import Key
from QEfficient.serve.failures import Refusal, refusal_of
from QEfficient.serve.logs import log
from QEfficient.serve.schemas import ChatRequest, CompletionRequest
from QEfficient.serve.server import Job, Server


async def answer(server: Server, body: ChatRequest | CompletionRequest, request: Request, key: Key | None) -> Response:
    """Answer one request.

    Raises:
        QEffError: It cannot be started.
    """
    started = time.perf_counter()
    shape = Shape(body.model, isinstance(body, ChatRequest))
    if isinstance(body, ChatRequest):
        job = await server.chat(body, key)
    else:
        job = await server.complete(body, key)
    if server.log_prompts:
        log("prompt", id=shape.id, body=body.model_dump(exclude_unset=True))
    headers = {"x-request-id": shape.id}
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _events(server, shape, job, key, started, with_usage)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={**headers, "cache-control": "no-store"}
        )
    status = 500
    try:
        whole = await _unless_gone(request, asyncio.gather(*(_collect(a) for a in job.answers)))
        status = 200
        return JSONResponse(shape.whole(job, whole), headers=headers)
    except Refusal as e:
        status = e.status
        raise
    finally:
        server.finish(job, status=status, key=key, started=started, request_id=shape.id)


async def _collect(one: Answer) -> list[Piece]:
    return [piece async for piece in one.pieces()]


async def _unless_gone(request: Request, work: "asyncio.Future[Any]") -> Any:
    """Wait for ``work``, unless the client goes away."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal(499, "the client went away", code="disconnected")
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    server: Server, shape: Shape, job: Job, key: Key | None, started: float, with_usage: bool
) -> AsyncIterator[bytes]:
    """Yield server-sent events; whatever happens, the job ends with them."""
    status = 499
    try:
        if shape.chat:
            for index in range(len(job.answers)):
                yield _event(shape.first(index))
        async for index, piece in _merged(job.answers):
            yield _event(shape.piece(index, piece))
        if with_usage:
            yield _event(shape.usage(job))
        yield b"data: [DONE]\n\n"
        status = 200
    except Exception as e:
        refusal = refusal_of(e)
        status = refusal.status
        log("stream failed", level=logging.ERROR, exception=e, id=shape.id)
        yield _event(refusal.body)
    finally:
        server.finish(job, status=status, key=key, started=started, request_id=shape.id)


async def _merged(answers: list[Answer]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of all answers as they come."""
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()

    async def pump(index: int, one: Answer) -> None:
        try:
            async for piece in one.pieces():
                queue.put_nowait((index, piece))
        except Exception as e:
            queue.put_nowait((index, e))

    tasks = [asyncio.create_task(pump(i, a)) for i, a in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            index, came = await queue.get()
            if isinstance(came, BaseException):
                raise came
            left -= came.finish_reason is not None
            yield index, came
    finally:
        for task in tasks:
            task.cancel()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
