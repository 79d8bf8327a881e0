# SPDX-License-Identifier: BSD-3-Clause
"""From a base and its adapters to a server that runs: export, compile, engine, registry, uvicorn."""

import logging
import signal
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from QEfficient.compile.program import compile_graph
from QEfficient.errors import ConfigError
from QEfficient.peft.loading import check_base
from QEfficient.runtime.engine import Engine
from QEfficient.serve.access import HEADER_BYTES, protocol
from QEfficient.serve.app import create_app
from QEfficient.serve.config import Keys
from QEfficient.serve.lanes import Lane, Lanes
from QEfficient.serve.loading import Loader, graph_for
from QEfficient.serve.logs import log
from QEfficient.serve.registry import Registry
from QEfficient.serve.server import Server
from QEfficient.serve.text import Prompts


def build(
    base: str,
    adapters: Mapping[str, str | Path],
    *,
    slots: int = 8,
    ctx_len: int = 1024,
    queue_len: int = 64,
    precision: str = "fp32",
    adapter_bytes: int = 1 << 30,
    prefix_bytes: int = 256 << 20,
    threads: int | None = None,
    large_pages: bool = False,
    chat_template: str = "",
    graphs: int = 2,
    **options: Any,
) -> Server:
    """Make a server; its engine runs already.

    Args:
        base: Folder or Hub id of the base.
        adapters: Those known from the start, by name; each is checked and loaded when first asked for.
        slots: Requests that run at a time.
        ctx_len: Longest context.
        queue_len: Requests that wait besides.
        precision: How the base's weights are held.
        adapter_bytes: Most memory of resident adapters.
        prefix_bytes: Most memory of what prompts leave for others that begin alike; 0: none.
        threads: Of one call of the program.
        large_pages: Weights on large pages of memory.
        graphs: Most graphs; an adapter that fits none gets one of its own kind, with the base's weights and a cache of its own.
        chat_template: Text of a template that replaces the tokenizer's.
        **options: Fields of :class:`Server`: ``limits``, ``keys``, ``places``, ``log_prompts``.

    Raises:
        QEffError: Why there can be no server.
    """
    check_base(base)
    tokenizer = _tokenizer(base)
    if chat_template:
        tokenizer.chat_template = chat_template
        _check_template(tokenizer)
    compiling: dict[str, Any] = {"ctx_len": ctx_len, "precision": precision, "mixed": True}

    def open_engine(program: Path) -> Engine:
        return Engine(
            program,
            slots=slots,
            ctx_len=ctx_len,
            queue_len=queue_len,
            threads=threads,
            large_pages=large_pages,
            adapter_bytes=adapter_bytes,
            prefix_bytes=prefix_bytes,
        ).start()

    graph = graph_for(base, adapters)
    first = Lane(graph, open_engine(compile_graph(graph, **compiling)))
    lanes = Lanes(base, first, open_engine, most=graphs, compiling=compiling)
    registry = Registry(first.engine.residents, Loader(lanes, most_bytes=adapter_bytes))
    lanes.on_empty, lanes.on_full = registry.tidy, registry.make_room
    for name, path in adapters.items():
        registry.register(name, path)
    return Server(lanes, registry, Prompts(tokenizer), base, _eos(base, tokenizer), ctx_len, **options)


def serve(server: Server, address: socket.socket) -> None:
    """Serve at an address that :func:`bind` returned until SIGTERM or SIGINT; then finish what runs, and return what is not finished in time."""
    limits = server.limits
    config = uvicorn.Config(
        create_app(server),
        http=protocol(limits),
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=int(limits.grace_seconds) + 10,
        timeout_keep_alive=30,
        access_log=False,
        log_config=None,
        server_header=False,
    )
    _Draining(config, server).run([address])


def bind(host: str, port: int) -> socket.socket:
    """Take an address, so that nothing is loaded in vain; nobody can connect yet.

    Raises:
        ConfigError: It is taken, not of this machine, or not allowed.
    """
    try:
        (family, kind, protocol_number, _, address), *_ = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        made = socket.socket(family, kind, protocol_number)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError, UnicodeError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise ConfigError(f"cannot listen at {host}, port {port}: {reason}; choose another --host or --port") from e
    return made


def need_keys(keys: Keys, host: str) -> None:
    """Refuse to serve other machines without keys.

    Raises:
        ConfigError: Nobody needs a key, and the address is not this machine's own.
    """
    if not keys.known and host not in {"127.0.0.1", "::1", "localhost"}:
        raise ConfigError(f"without API keys the server only listens to this machine, not {host}: give --api-keys FILE")


class _Draining(uvicorn.Server):
    """Refuses new requests from the first signal on, and ends running ones when their time is up; then it stops to listen."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._served = server

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where: the port may be the system's choice."""
        await super().startup(sockets)
        for listener in sockets or ():
            host, port, *_ = listener.getsockname()
            log("listening", host=host, port=port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._served.draining:
            self._served.draining = True
            log("draining", signal=signal.Signals(sig).name, level=logging.INFO)
            timer = threading.Timer(self._served.limits.grace_seconds, self._served.abort_all)
            timer.daemon = True
            timer.start()
            return
        # Not super(): it would raise the signal again at the end, and a server that finished its work ends with code 0.
        self.force_exit = sig == signal.SIGINT
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Go on until what runs has ended: who comes meanwhile is told to go elsewhere, and so is a health check."""
        self.should_exit = self.should_exit or (self._served.draining and not self._served.jobs)
        return await super().on_tick(counter)


def _tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"no tokenizer in {base!r} ({str(e).strip().splitlines()[0]})") from e


def _check_template(tokenizer: Any) -> None:
    """Refuse a template that is none; what one says of messages is up to it."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as e:
        raise ConfigError(f"the chat template is wrong in line {e.lineno}: {e.message}") from e
    except Exception:  # raised by the template itself: it may want a system message first
        return


def _eos(base: str, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends an answer: the generation configuration's, and the tokenizer's."""
    from transformers import GenerationConfig

    found: Any = None
    try:
        found = GenerationConfig.from_pretrained(base).eos_token_id
    except (OSError, ValueError):
        pass  # many bases have none
    ids = found if isinstance(found, list) else [found]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)
