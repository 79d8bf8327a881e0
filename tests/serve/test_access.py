# SPDX-License-Identifier: BSD-3-Clause
"""The door, in front of an application that answers when it is told to."""

import asyncio
from typing import Any

from QEfficient.serve.access import Door
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
