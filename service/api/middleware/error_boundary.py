"""The one place where what is not ours becomes an error of ours. Pure ASGI, around everything but the Recorder.

What RequestError's handlers (errors.py) have not turned into an answer ends here: an exception of any kind, from a
handler, a middleware or the writing of an answer, and an error that a library answers in its own words.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_body, error_response, foreign_error
from service.api.generation.sse import EventStream, encoded_event
from service.api.middleware.record import RequestRecord, record_of
from service.contract.errors import InternalError, RequestError

logger = logging.getLogger("xlora.request")


class ErrorBoundary:
    """Nothing but our answers leaves it, and nothing is raised out of it. A surprise is one record in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        try:
            await self._app(scope, receive, answer.send)
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except asyncio.CancelledError:  # by the server, which ends: it would call this an exception of ours
            await answer.fail(InternalError("the server stopped", code="stopping", hint="send the request again"))
        except RequestError as error:
            await answer.fail(error)
        except BaseException as error:  # a panic in Rust, for one, is no Exception
            _log(error, record_of(scope))
            await answer.fail(
                InternalError("an internal error occurred", hint="the server's log describes it, under X-Request-Id")
            )


class _Answer:
    """One answer on its way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started = False
        self._replaced = False
        self._open_events = False

    async def send(self, message: Message) -> None:
        """A message of the application; an error in a library's own words is put into ours."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            self._started = True
            if message["status"] >= 400 and headers.get("content-type", "").startswith("text/"):
                self._replaced = True
                await self._replace(message["status"], headers)
                return
            self._open_events = headers.get("content-type", "").startswith(EventStream.media_type)
        elif not message.get("more_body", False):
            self._open_events = False
        if not self._replaced:
            await self._send(message)

    async def fail(self, error: RequestError) -> None:
        """Ends the answer with an error. Where that can no longer be said, the server closes the connection."""
        if not self._started:
            await error_response(error)(self._scope, self._receive, self._send)
            return
        record_of(self._scope).outcome = "error"
        if self._open_events:
            await self._send({"type": "http.response.body", "body": encoded_event(error_body(error))})

    async def _replace(self, status: int, headers: Headers) -> None:
        kept = {name: value for name, value in headers.items() if name not in ("content-type", "content-length")}
        await error_response(foreign_error(status), kept)(self._scope, self._receive, self._send)


def _log(error: BaseException, record: RequestRecord) -> None:
    fields = {"request_id": record.request_id}
    logger.error("%s %s failed", record.method, record.route, exc_info=error, extra={"fields": fields})
