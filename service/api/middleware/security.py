"""Access control before the routes: who may pass, and the limits on bodies. Pure ASGI. The tables hold paths of matched
routes.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response
from service.api.middleware.keys import Keys
from service.api.middleware.record import record_of
from service.contract.errors import PayloadTooLargeError, RequestError, SlowBodyError, UnauthorizedError

# All but the probes are pages that ask for the key themselves, and their files.
OPEN_ROUTES = frozenset({"/livez", "/readyz", "/", "/docs", "/redoc", "/web"})
ADMIN_ROUTES = frozenset({"/metrics", "/health", "/info", "/gate", "/scalings/log", "/scalings/log.npz"})

_BODY_SECONDS = 60.0
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 256 << 20


class Guard:
    """Answers 401 to everything but the probes, unless a key of ours is sent as `Authorization: Bearer`.

    Without any keys nothing is asked. Admin keys open everything; where there are some, the operator's routes take no
    others. What has no route is closed as well.
    """

    def __init__(self, app: ASGIApp, api_keys: Keys, admin_keys: Keys) -> None:
        self._app = app
        self._api_keys = api_keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        error = UnauthorizedError("a valid key is needed", hint="send the header Authorization: Bearer KEY")
        await error_response(error, {"WWW-Authenticate": "Bearer", "Connection": "close"})(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        route = record_of(scope).route
        for_admins = route in ADMIN_ROUTES and bool(self._admin_keys)
        if route in OPEN_ROUTES or not (self._api_keys or for_admins):
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        admin, user = self._admin_keys.have(key.strip()), self._api_keys.have(key.strip())
        return admin or (user and not for_admins)


class BodyLimit:
    """Answers 413 as soon as a body is known to be over the limit: from its Content-Length, or while it streams in.

    A body that does not arrive in time is 408. What was read is handed on to the application, so that it sees the same
    messages it would have seen.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, seconds: float = _BODY_SECONDS) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        length = body_length(scope)
        if length is not None and length > self._max_body_bytes:
            await refuse_unread(self._too_large(), scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
        except TimeoutError:
            error = SlowBodyError(f"the body did not arrive within {self._seconds:g} seconds")
            await error_response(error, {"Connection": "close"})(scope, receive, send)
        except PayloadTooLargeError as error:
            await refuse_unread(error, scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None when the client has gone. Raises PayloadTooLargeError."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"the body is larger than {self._max_body_bytes} bytes", hint="the server's --max-body-bytes sets the limit"
        )


def body_length(scope: Scope) -> int | None:
    """The body's length as the headers state it; None where it is sent in chunks, until it ends."""
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return None
    length = headers.get("content-length", "0")
    return int(length[:20]) if length.isdecimal() else None


async def refuse_unread(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the error, then reads on a little: closing on unread data would reset the connection, error and all."""

    async def send_and_linger(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await error_response(error, {"Connection": "close"})(scope, receive, send_and_linger)


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
