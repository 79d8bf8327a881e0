# SPDX-License-Identifier: BSD-3-Clause
"""The door: size and pace of bodies, keys and their limits. Plain ASGI, so that it stands before everything else."""

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from QEfficient.serve.config import Key, Keys, Limits
from QEfficient.serve.failures import Refusal
from QEfficient.serve.logs import log

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

OPEN = frozenset({"/", "/health", "/openapi.json"})
"""What needs no key: it tells nothing about adapters or clients."""

HEADER_BYTES = 64 << 10
_HEADER_LINES = 100
_CROWDED = "crowded"


class Door:
    """Middleware that lets in what is allowed.

    Args:
        app: What stands behind it.
        keys: Who may come in.
        limits: How much they may bring, and how slowly.
        on_refusal: Told the status of each that is not let in.
    """

    def __init__(
        self, app: Any, *, keys: Keys, limits: Limits, on_refusal: Callable[[int], None] = lambda status: None
    ) -> None:
        self._app, self._keys, self._limits, self._on_refusal = app, keys, limits, on_refusal
        self._running: Counter[str] = Counter()
        self._recent: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        paced = self._paced(send)
        key, counted = None, ""
        try:
            if scope.get("state", {}).get(_CROWDED):
                message = f"{self._limits.connections} connections are open, and no more may be; try again later"
                raise Refusal(503, message, code="too_many_connections", retry_seconds=1)
            if len(scope["headers"]) > _HEADER_LINES:
                raise Refusal(431, f"more than {_HEADER_LINES} header lines", code="too_many_headers")
            key = self._identify(scope)
            scope.setdefault("state", {})["key"] = key
            counted = self._admit(key, scope["path"])
            self._running[counted] += bool(counted)  # before its body comes: others may come meanwhile
            body = _readable(await self._body(scope, receive))
        except Refusal as e:
            log("refused", key=key.name if key else None, path=scope["path"], status=e.status, code=e.code)
            self._on_refusal(e.status)
            await _answer(paced, e)
        else:
            await self._app(scope, _replayed(body, receive), paced)
        finally:
            self._running[counted] -= bool(counted)

    def _identify(self, scope: Scope) -> Key | None:
        if not self._keys.known or scope["path"] in OPEN:
            return None
        given = [v.decode("latin-1") for k, v in scope["headers"] if k == b"authorization"]
        if len(given) != 1:
            raise Refusal(401, "give an API key: Authorization: Bearer KEY", code="missing_api_key")
        key = self._keys.find(given[0])
        if key is None:
            raise Refusal(401, "this API key is not known", code="invalid_api_key")
        return key

    def _admit(self, key: Key | None, path: str) -> str:
        """Return whose running request this is, "" if nobody counts it."""
        if key is None or not path.endswith("completions"):
            return ""
        if key.running and self._running[key.name] >= key.running:
            raise Refusal(
                429,
                f"{key.running} requests of this key are running already",
                code="concurrency_limit",
                retry_seconds=1,
            )
        if key.requests_per_minute:
            recent = self._recent.setdefault(key.name, deque())
            now = time.monotonic()
            while recent and recent[0] <= now - 60:
                recent.popleft()
            if len(recent) >= key.requests_per_minute:
                wait = int(recent[0] + 60 - now) + 1
                message = f"this key may send {key.requests_per_minute} requests a minute"
                raise Refusal(429, message, code="rate_limit_exceeded", retry_seconds=wait)
            recent.append(now)
        return key.name

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Take in the whole body; refuse what is too long or comes too slowly."""
        most = self._limits.body_bytes
        too_long = Refusal(413, f"the request's body is longer than {most} bytes", code="body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise too_long
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.receive_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Refusal(400, "the client went away", code="disconnected")
                    parts.append(message.get("body", b""))
                    if (size := size + len(parts[-1])) > most:
                        raise too_long
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as e:
            seconds = self._limits.receive_seconds
            raise Refusal(408, f"the body did not come within {seconds:g} s", code="body_too_slow") from e

    def _paced(self, send: Send) -> Send:
        async def paced(message: Any) -> None:
            try:
                async with asyncio.timeout(self._limits.send_seconds):
                    await send(message)
            except TimeoutError as e:
                raise OSError("the client does not read its answer") from e

        return paced


def _readable(body: bytes) -> bytes:
    """Refuse JSON with halves of characters, which nothing behind can write down."""
    if b"\\ud" in body.lower():
        try:
            json.dumps(json.loads(body), ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise Refusal(400, "the body holds half of a surrogate pair", code="invalid_unicode") from e
        except (ValueError, RecursionError):
            pass  # said better by whoever wants to read it
    return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that first gives ``body``, then what comes of the connection."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _answer(send: Send, refusal: Refusal) -> None:
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= refusal.headers
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def protocol(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol, closing connections whose headers do not come in time.

    It tells the door when there are more connections than may be: uvicorn's own answer is none of OpenAI's form.
    """

    class Punctual(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._behind, self.app = self.app, self._counted

        async def _counted(self, scope: Any, receive: Any, send: Any) -> None:
            scope["state"][_CROWDED] = len(self.connections) > limits.connections
            await self._behind(scope, receive, send)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _expect(self) -> None:
            """Start the clock when headers begin, stop it when they are whole."""
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            elif self._deadline is None and not self.transport.is_closing():
                self._deadline = self.loop.call_later(limits.receive_seconds, self.transport.close)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Punctual
