"""Calls that cannot be admitted, refused before their bodies are read: what a full server refuses costs it little."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response
from service.api.middleware.record import record_of
from service.api.middleware.security import body_length, refuse_unread
from service.api.state import Service
from service.contract.errors import RequestError


class EarlyRefusal:
    """Answers 429 or 503 to calls on some routes while not even the least of them could be admitted."""

    def __init__(self, app: ASGIApp, service: Service, routes: Collection[str]) -> None:
        self._app = app
        self._service = service
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        length = body_length(scope)
        if length is not None and length <= self._service.settings.max_body_bytes:
            await error_response(error)(scope, receive, send)  # the body is skipped, and the connection goes on
        else:
            await refuse_unread(error, scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        if scope["method"] != "POST" or record_of(scope).route not in self._routes:
            return None
        try:
            self._service.check_serving()
            self._service.admission.check()
        except RequestError as error:
            return error
        return None
