# SPDX-License-Identifier: BSD-3-Clause
"""The door, in front of an application that answers when it is told to."""

import asyncio
import json
import socket
from typing import Any

import uvicorn

from QEfficient.serve.access import Door, protocol
from QEfficient.serve.config import Key, Keys, Limits

SECRET = "a-long-secret"


def ask(door: Door, path: str, body: "asyncio.Future[bytes]") -> "asyncio.Task[int]":
    """Send one request whose body comes when it comes; return its status."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": await body}

    async def whole() -> int:
        said: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        headers = [(b"authorization", b"Bearer " + SECRET.encode())]
        await door({"type": "http", "path": path, "headers": headers}, receive, send)
        return int(said[0]["status"])

    return asyncio.ensure_future(whole())


def test_no_more_run_than_a_key_may_have() -> None:
    """Requests whose bodies are on their way count, what is no completion does not, and each counts until it ends."""

    async def run() -> None:
        ends: asyncio.Future[None] = asyncio.Future()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            if "completions" in scope["path"]:
                await ends
            await send({"type": "http.response.start", "status": 200})

        door = Door(app, keys=Keys.of([Key(name="shop", key=SECRET, running=2)]), limits=Limits())
        bodies = [asyncio.Future[bytes]() for _ in range(4)]
        models = ask(door, "/v1/models", bodies[0])
        running = [ask(door, "/v1/completions", body) for body in bodies[1:]]
        await asyncio.sleep(0.01)
        for body in bodies:
            body.set_result(b"{}")
        assert await models == 200
        assert await asyncio.wait_for(running[2], 5) == 429
        ends.set_result(None)
        assert [await task for task in running[:2]] == [200, 200]
        assert await ask(door, "/v1/completions", bodies[0]) == 200
        too_long: asyncio.Future[bytes] = asyncio.Future()
        too_long.set_result(b"x" * (5 << 20))
        assert [await ask(door, "/v1/completions", too_long) for _ in range(3)] == [413] * 3  # they left nothing behind
        assert await ask(door, "/v1/completions", bodies[0]) == 200

    asyncio.run(run())


def test_no_more_connections_than_may_be() -> None:
    """One more is answered in OpenAI's form, and told when to come again; once another has gone, the next is served."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def get(port: int) -> tuple[bytes, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        return head if b" 200 " in head else head + await reader.read(), writer

    async def run() -> None:
        limits = Limits(connections=2)
        door = Door(app, keys=Keys(), limits=limits)
        server = uvicorn.Server(uvicorn.Config(door, http=protocol(limits), lifespan="off", log_config=None))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            serving = asyncio.ensure_future(server.serve([listener]))
            (_, first), (answer, second) = await get(port), await get(port)
            assert answer.startswith(b"HTTP/1.1 200 ")
            answer, _ = await get(port)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in head
            error = json.loads(body)["error"]
            assert (error["type"], error["code"]) == ("server_error", "too_many_connections")
            first.close()
            while len(server.server_state.connections) > 1:
                await asyncio.sleep(0.01)
            answer, third = await get(port)
            assert answer.startswith(b"HTTP/1.1 200 ")
            second.close()
            third.close()
            server.should_exit = True
            await serving

    asyncio.run(run())
