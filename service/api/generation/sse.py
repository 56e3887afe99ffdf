"""Answers that stop when the client goes away, and at their deadline: one helper for all handlers, and server-sent
events on top of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.connections.bounds import abort_connection
from service.api.errors import error_body
from service.api.generation.deadlines import GRACE_SECONDS
from service.api.middleware.record import record_of
from service.contract.errors import RequestError, TimedOutError

DONE = b"data: [DONE]\n\n"

# JSON may have these as they are, and escapes the others by itself: U+2028, U+2029, U+0085.
_LINE_ENDS = ((b"\xe2\x80\xa8", rb"\u2028"), (b"\xe2\x80\xa9", rb"\u2029"), (b"\xc2\x85", rb"\u0085"))

_T = TypeVar("_T")


class ClientGoneError(Exception):
    """The client has closed the connection: nobody reads the answer."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T], deadline: float) -> _T:
    """Awaits `work`, and cancels it when the client goes away first, or a little after the deadline (in the time of the
    event loop), whatever it waits for. The request's body must have been read.

    Raises ClientGoneError or TimedOutError then, after the work has cleaned up: its requests to the engine are aborted.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    left = max(0.0, deadline + GRACE_SECONDS - asyncio.get_running_loop().time())
    try:
        await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError if gone.done() else TimedOutError("the request has reached its timeout")
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await unfinished


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Mapping[str, object]) -> bytes:
    """One event; numpy arrays become lists, NaN becomes null."""
    return encoded_event(orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY))


def encoded_event(data: bytes) -> bytes:
    """One event from its JSON. What some readers of lines take for the end of one is escaped: it stands in strings."""
    for character, escape in _LINE_ENDS:
        data = data.replace(character, escape)
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Server-sent events from an iterator of encoded events.

    The status is sent with the first event: an error raised before it becomes an ordinary answer. A later one becomes
    an event of its own, and the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], deadline: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._deadline = deadline
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything, or stops when the client goes away. Who has not taken it all by the deadline is cut off.

        Raises the RequestError that came before the first event.
        """
        try:
            await until_disconnect(receive, self._send_all(scope, send), self._deadline)
        except (ClientGoneError, OSError):
            record_of(scope).outcome = "cancelled"
        except TimedOutError:
            if not self._started:
                raise
            record_of(scope).outcome = "timeout"
            if abort_connection(scope):
                await _disconnected(receive)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with contextlib.aclosing(self._events) as events:
            first = await anext(events)
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await body(first)
                async for data in events:
                    await body(data)
            except RequestError as error:
                record_of(scope).outcome = "error"
                await body(encoded_event(error_body(error)))
        await body(b"", more=False)
