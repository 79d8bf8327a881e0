# SPDX-License-Identifier: BSD-3-Clause
"""The same server on Ray Serve: one front, any number of replicas with an engine each, on any number of nodes.

The front knows which adapters there are and lets clients in; a replica is a whole server (its routes, checks and limits of a request) without a door.
What the front knows of an adapter travels with the requests for it, so replicas need not be told of changes. Ray Serve's model
multiplexing sends requests to a replica that has the adapter in memory.
"""

import asyncio
import itertools
import json
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from QEfficient.errors import AdapterNotFoundError, ConfigError
from QEfficient.serve.access import Door
from QEfficient.serve.app import create_app
from QEfficient.serve.config import Key, Keys, Limits, Places
from QEfficient.serve.failures import Refusal
from QEfficient.serve.logs import configure, log
from QEfficient.serve.metrics import METRICS_TYPE, merged
from QEfficient.serve.start import build

LOAD, UNLOAD, METRICS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics"
REPLICA_HEADER = b"x-qefficient-replica"
_RETRY_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Known:
    """An adapter as the front knows it.

    Attributes:
        place: Folder or Hub id; on a cluster a folder that every node sees.
        generation: Grows with each content of the name.
    """

    place: str
    generation: int


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way to a replica.

    Attributes:
        adapters: What is known of the adapters that it concerns; ``None``: there is no such adapter.
        whole: There are no others.
        loads: Name and generation that the request brings, if it succeeds.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    key: Key | None = None
    adapters: Mapping[str, Known | None] = field(default_factory=dict)
    whole: bool = False
    loads: tuple[str, int] | None = None


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


def application(
    base: str,
    adapters: Mapping[str, str | Path],
    settings: Mapping[str, Any],
    *,
    replicas: int,
    models_per_replica: int = 64,
) -> Any:
    """Return the Ray Serve application.

    Args:
        base: Folder or Hub id of the base.
        adapters: Those known from the start.
        settings: As :func:`QEfficient.serve.start.build` takes them.
        replicas: How many engines.
        models_per_replica: Adapters of a replica that Ray Serve keeps in mind.

    Raises:
        ConfigError: Ray is not installed.
    """
    serve = _ray_serve()
    limits: Limits = settings.get("limits") or Limits()
    keys: Keys = settings.get("keys") or Keys()
    places: Places = settings.get("places") or Places()
    app = FastAPI(openapi_url=None)
    app.add_middleware(Door, keys=keys, limits=limits)
    running = settings.get("slots", 8) + settings.get("queue_len", 64)

    class Engine(Replica):
        @serve.multiplexed(max_num_models_per_replica=models_per_replica)  # type: ignore[untyped-decorator]
        async def adapter(self, name: str) -> str:
            return name  # its memory is the registry's affair; Ray Serve only remembers who was asked for it

        async def called(self, call: Call) -> AsyncIterator[Any]:
            if name := serve.get_multiplexed_model_id():
                await self.adapter(name)
            async for message in self.answer(call, str(serve.get_replica_context().replica_id.unique_id)):
                yield message

        async def told(self) -> tuple[str, str]:
            return str(serve.get_replica_context().replica_id.unique_id), self.metrics()

        def __del__(self) -> None:
            self.close()

    class Entrance:
        def __init__(self, engines: Any) -> None:
            def send(call: Call, name: str) -> AsyncIterator[Any]:
                answered: AsyncIterator[Any] = engines.options(
                    stream=True, method_name="called", multiplexed_model_id=name
                ).remote(call)
                return answered

            async def ask_all() -> Sequence[tuple[str, str]]:
                told: Sequence[tuple[str, str]] = await engines.broadcast("told").results_async()
                return told

            self.front = Front(send, ask_all, adapters, places)

        @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
        async def answer(self, request: Request) -> Response:
            return await self.front(request)

    common: dict[str, Any] = {"graceful_shutdown_timeout_s": limits.grace_seconds}
    engines = serve.deployment(
        Engine,
        name="engine",
        num_replicas=replicas,
        max_ongoing_requests=2 * running,  # the engine's own queue refuses first
        ray_actor_options={"num_cpus": settings.get("threads") or 1},
        **common,
    )
    entrance = serve.deployment(
        serve.ingress(app)(Entrance), name="front", max_ongoing_requests=limits.connections, **common
    )
    return entrance.options(ray_actor_options={"num_cpus": 0}).bind(engines.bind(base, dict(adapters), dict(settings)))


def serve_cluster(app: Any, *, host: str, port: int, address: str | None = None) -> None:
    """Deploy on a Ray cluster, or on one that is made here, and serve until SIGTERM or SIGINT.

    Args:
        app: As :func:`application` makes it.
        host: Address to listen on.
        port: Port to listen on.
        address: Of a cluster that runs, as ``ray.init`` takes it; ``None``: this machine alone.

    Raises:
        ConfigError: There is no such cluster, or the replicas cannot start.
    """
    serve = _ray_serve()
    import ray

    dashboard = None if address else False
    try:
        ray.init(address=address, namespace="qefficient", log_to_driver=True, include_dashboard=dashboard)
    except (ConnectionError, ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"no Ray cluster at {address or 'this machine'}: {reason}") from e
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name="qefficient", route_prefix="/")
    except (ray.exceptions.RayError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"Ray Serve could not start the replicas; its log above says why ({reason})") from e
    ended = threading.Event()
    for sent in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sent, lambda *_: ended.set())
    log("ready", engine="ray")
    ended.wait()
    log("draining")
    serve.shutdown()
    ray.shutdown()


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as e:
        raise ConfigError("--engine ray needs Ray Serve: pip install 'efficient-transformers[serve,ray]'") from e
    return serve


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


def _field(body: bytes, name: str) -> str:
    """Return a text of a JSON body; empty if there is none, for the replica to say what is wrong."""
    try:
        found = json.loads(body)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""
