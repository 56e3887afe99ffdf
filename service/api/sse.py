"""Answers that stop when the client goes away: one helper for all handlers, and server-sent events on top of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.errors import error_body
from service.api.record import record_of
from service.errors import RequestError

DONE = b"data: [DONE]\n\n"

_T = TypeVar("_T")


class ClientGoneError(Exception):
    """The client has closed the connection: nobody reads the answer."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Awaits `work` and cancels it when the client goes away first. The request's body must have been read.

    Raises ClientGoneError then, after the work has cleaned up: its requests to the engine are aborted.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await unfinished


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any]) -> bytes:
    """One event; numpy arrays become lists, NaN becomes null."""
    return encoded_event(orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY))


def encoded_event(data: bytes) -> bytes:
    """One event from its JSON."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Server-sent events from an iterator of encoded events.

    The status is sent with the first event: an error raised before it becomes an ordinary answer. A later one becomes
    an event of its own, and the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything, or stops when the client goes away."""
        try:
            await until_disconnect(receive, self._send_all(scope, send))
        except (ClientGoneError, OSError):
            record_of(scope).outcome = "cancelled"

    async def _send_all(self, scope: Scope, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with contextlib.aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await body(first)
                async for data in events:
                    await body(data)
            except RequestError as error:
                record_of(scope).outcome = "error"
                await body(encoded_event(error_body(error)))
        await body(b"", more=False)
