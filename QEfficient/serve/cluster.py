# SPDX-License-Identifier: BSD-3-Clause
"""The same server on Ray Serve: one front, any number of replicas with an engine each, on any number of nodes.

Ray Serve's model multiplexing sends requests to a replica that has the adapter in memory.
"""

import signal
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from QEfficient.errors import ConfigError
from QEfficient.serve.access import Door
from QEfficient.serve.calls import Call
from QEfficient.serve.config import Keys, Limits, Places
from QEfficient.serve.front import Front
from QEfficient.serve.logs import log
from QEfficient.serve.replica import Replica


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
    log("listening", host=host, port=port)
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
