# SPDX-License-Identifier: BSD-3-Clause
"""A replica of a cluster: a whole server (its routes, checks and limits of a request) without a door, asked by calls."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from QEfficient.errors import AdapterNotFoundError
from QEfficient.serve.app import create_app
from QEfficient.serve.calls import Call
from QEfficient.serve.logs import configure
from QEfficient.serve.start import build

REPLICA_HEADER = b"x-qefficient-replica"


class Replica:
    """One server, asked by calls.

    Args:
        base: Folder or Hub id of the base.
        adapters: Those known from the start; they decide the graph.
        settings: As :func:`QEfficient.serve.start.build` takes them.
    """

    def __init__(self, base: str, adapters: Mapping[str, str | Path], settings: Mapping[str, Any]) -> None:
        configure()
        self._server = build(base, adapters, **settings)
        self._app = create_app(self._server, door=False)
        self._generations = {name: number for number, name in enumerate(adapters, 1)}  # as the front counts

    async def answer(self, call: Call, name: str) -> AsyncIterator[Any]:
        """Yield the ASGI messages of the answer, with this replica's name among the headers."""
        self._learn(call)
        messages: asyncio.Queue[Any] = asyncio.Queue(16)
        gone = asyncio.Event()
        body: list[Any] = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Any:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(_scope(call), receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA_HEADER, name.encode())]
                    if call.loads is not None and message["status"] == 200:
                        self._generations[call.loads[0]] = call.loads[1]
                yield message
        finally:
            gone.set()
            task.cancel()

    def metrics(self) -> str:
        """Return what Prometheus is told."""
        return self._server.metrics.text().decode()

    def close(self) -> None:
        """End what runs."""
        self._server.close()

    def _learn(self, call: Call) -> None:
        """Know what the front knows of the adapters that a call concerns."""
        adapters = dict(call.adapters)
        if call.whole:
            adapters |= {name: None for name in self._generations if name not in adapters}
        for name, known in adapters.items():
            if known is None:
                if self._generations.pop(name, None) is not None:
                    with suppress(AdapterNotFoundError):
                        self._server.registry.unregister(name)
            elif self._generations.get(name) != known.generation:
                self._server.registry.register(name, known.place, replace=True)
                self._generations[name] = known.generation


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
        "state": {"key": call.key},
    }
