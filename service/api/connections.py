"""Connections that cost nothing when they are abused: a bound on the request line and headers, and on their time."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.errors import error_response
from service.errors import HeadersTooLargeError, InvalidRequestError

_HEADER_SECONDS = 20.0
_HEADER_OVERHEAD_BYTES = 4  # colon, space, line break


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which by itself collects headers without end and waits for them for ever."""

    def __init__(self, *args: Any, max_header_bytes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_header_bytes = max_header_bytes
        self._application = self.app
        self._head_bytes = 0  # of chunks since the last complete head
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self._max_header_bytes and not self.transport.is_closing():
                self._refuse_unfinished_head()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._end_head()
        size = len(self.url) + sum(len(name) + len(value) + _HEADER_OVERHEAD_BYTES for name, value in self.headers)
        self.app = self._application if size <= self._max_header_bytes else self._refuse
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._end_head()
        self._head_timer = self.loop.call_later(_HEADER_SECONDS, self._close_idle)

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_idle(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse_unfinished_head(self) -> None:
        self._end_head()
        body = error_response(self._error()).body
        self._write_error(431, "Request Header Fields Too Large", bytes(body))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP."""
        self._end_head()
        self._write_error(400, "Bad Request", bytes(error_response(InvalidRequestError("this is not HTTP")).body))

    def _write_error(self, status: int, reason: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await error_response(self._error(), {"Connection": "close"})(scope, receive, send)

    def _error(self) -> HeadersTooLargeError:
        return HeadersTooLargeError(
            f"the request line and headers are larger than {self._max_header_bytes} bytes",
            hint="the server's --max-header-bytes sets the limit",
        )
