"""Connections that cost nothing when they are abused: bounds on what a peer may send, and on every time that it takes.

    HEAD    the first, or the next that has begun: whole within header_seconds
    BODY    whole within body_seconds, whatever the method, and also when the answer has been given already
    REST    between two requests: keep_alive_seconds, whatever else comes than a request
    and in all of them: what was written must be taken; who takes nothing for write_seconds is cut off

This file knows HTTP's messages, and nothing of what they ask.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.connections.open_connections import OpenConnections
from service.api.connections.outflow import Outflow
from service.api.errors import error_response
from service.contract.errors import HeadersTooLargeError, InvalidRequestError

_HEADER_OVERHEAD_BYTES = 4  # colon, space, line break
_EXTENSION = "xlora.connection"  # in the ASGI scope


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The limits of one connection."""

    header_bytes: int  # request line and headers
    keep_alive_seconds: float
    write_seconds: float
    header_seconds: float = 20.0
    body_seconds: float = 65.0  # security.py answers 408 before that, where a body is read


class Phase(enum.Enum):
    """The part of a request that is awaited from the peer."""

    HEAD = enum.auto()
    BODY = enum.auto()
    REST = enum.auto()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself collects headers without end and waits for everything for ever."""

    def __init__(self, *args: Any, limits: ConnectionLimits, connections: OpenConnections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._others = connections
        self._application = self.app
        self._seconds = {
            Phase.HEAD: limits.header_seconds,
            Phase.BODY: limits.body_seconds,
            Phase.REST: limits.keep_alive_seconds,
        }
        self._phase = Phase.HEAD
        self._phase_ends_at = 0.0
        self._head_bytes = 0  # of chunks that are all of one head
        self._trailer_bytes = 0
        self._received = 0  # whole requests
        self._unanswered: deque[RequestResponseCycle] = deque()  # all but the first wait for their turn

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._outflow = Outflow(transport, self.loop.time())
        self._extensions: dict[str, dict[object, object]] = {_EXTENSION: {"abort": transport.abort}}
        self._enter(Phase.HEAD)
        self._others.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop. uvicorn tells the latest request alone: where several came at once, another one runs."""
        self._others.discard(self)
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        received = self._received
        super().data_received(data)
        if self._phase is Phase.HEAD and self._received == received:  # else the most of it may be other requests
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.header_bytes and not self.transport.is_closing():
                self._refuse_unfinished_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._enter(Phase.HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for what follows a body in chunks."""
        if self._phase is not Phase.BODY:
            super().on_header(name, value)
            return
        self._trailer_bytes += len(name) + len(value) + _HEADER_OVERHEAD_BYTES
        if self._trailer_bytes > self._limits.header_bytes:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._enter(Phase.BODY)
        size = len(self.url) + sum(len(name) + len(value) + _HEADER_OVERHEAD_BYTES for name, value in self.headers)
        self.app = self._application if size <= self._limits.header_bytes else self._refuse
        super().on_headers_complete()
        self._unanswered.append(self.cycle)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._received += 1
        self._enter(Phase.REST)
        if self._busy:
            self._others.mark_busy(self)

    def on_response_complete(self) -> None:
        """Called by uvicorn, whose own timer ends with the next byte, whatever that is."""
        super().on_response_complete()
        self._unset_keepalive_if_required()
        self._unanswered.popleft()
        if not self._busy:
            self._enter(self._phase)  # nothing was read of it meanwhile
            self._others.mark_idle(self)

    def look(self, now: float) -> None:
        """Ends the connection when its peer has had its time."""
        closing = self.transport.is_closing()
        growing = self._busy and not self.flow.write_paused and not closing
        if self._outflow.stuck_seconds(now, growing, closing) > self._limits.write_seconds:
            self.transport.abort()
        elif now > self._phase_ends_at and not self._busy and not closing:
            self.transport.close()

    def let_go(self) -> bool:
        """Ends the connection at once, unless its peer still has something to take; whether it did."""
        if self._outflow.unsent_bytes:
            return False
        self.transport.abort()  # close() would wait for the peer under TLS
        return True

    @property
    def _busy(self) -> bool:
        """Whether a whole request is in progress: the peer has nothing to do but to take the answer."""
        return bool(self._unanswered) and not self._unanswered[0].more_body

    def _enter(self, phase: Phase) -> None:
        self._phase, self._phase_ends_at = phase, self.loop.time() + self._seconds[phase]
        self._head_bytes = self._trailer_bytes = 0

    def _refuse_unfinished_head(self) -> None:
        body = error_response(self._error()).body
        self._write_error(431, "Request Header Fields Too Large", bytes(body))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP."""
        self._write_error(
            400, "Bad Request", bytes(error_response(InvalidRequestError("what was sent is not HTTP/1.1")).body)
        )

    def _write_error(self, status: int, reason: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await error_response(self._error(), {"Connection": "close"})(scope, receive, send)

    def _error(self) -> HeadersTooLargeError:
        return HeadersTooLargeError(
            f"the request line and headers are larger than {self._limits.header_bytes} bytes",
            hint="the server's --max-header-bytes sets the limit",
        )


def abort_connection(scope: Scope) -> bool:
    """Ends the connection that a request came by at once, unsent bytes and all; whether this server could."""
    extension = scope.get("extensions", {}).get(_EXTENSION)
    if extension is None:
        return False  # another server's, such as Ray Serve's
    extension["abort"]()
    return True
