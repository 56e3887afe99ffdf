"""What stands before the routes: the limit on bodies, and the count of requests by outcome. Pure ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response
from service.errors import PayloadTooLargeError
from service.metrics import Metrics

OUTCOME_KEY = "xlora_outcome"  # in the ASGI scope: what a handler knows better than the status tells

_LINGER_SECONDS = 2.0
_LINGER_BYTES = 256 << 20


class BodyLimit:
    """Answers 413 as soon as a body is known to be over the limit: from its Content-Length, or while it streams in.

    What was read is handed on to the application, so that it sees the same messages it would have seen.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            await self._refuse(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                await self._refuse(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        await self._app(scope, _replay(bytes(body), receive), send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the error, then reads on a little: closing on unread data would reset the connection, error and all."""
        error = PayloadTooLargeError(
            f"the body is larger than {self._max_body_bytes} bytes", hint="the server's --max-body-bytes sets the limit"
        )

        async def send_and_linger(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
                return
            await send({**message, "more_body": True})
            await _discard(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await error_response(error, {"Connection": "close"})(scope, receive, send_and_linger)


class RequestCounter:
    """Counts every request of some paths by outcome: ok, invalid (4xx), error (5xx), or cancelled by the client."""

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] not in self._endpoints:
            await self._app(scope, receive, send)
            return
        status = 0

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            outcome = scope.get(OUTCOME_KEY) or _outcome(status)
            self._metrics.requests.labels(scope["path"], outcome).inc()


def _outcome(status: int) -> str:
    if status == 0:
        return "cancelled"
    return "ok" if status < 400 else "invalid" if status < 500 else "error"


def _replay(body: bytes, receive: Receive) -> Receive:
    pending = True

    async def replay() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _discard(receive: Receive) -> None:
    discarded = 0
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while discarded < _LINGER_BYTES:
                message = await receive()
                discarded += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
