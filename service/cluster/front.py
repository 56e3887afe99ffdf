"""The middleware of Ray Serve's proxies, before a replica is chosen and around its answer. Pure ASGI, without ray.

    client -> Front -> BodyLimit -> Affinity -> Ray's proxy, its router, a replica: the whole application

Ray knows neither our errors nor our prompts: a request that no replica could answer ends in Ray's own plain text or in
nothing, a stream whose replica died just stops, and its router sees headers only. Keys, routes and the bounds on
queues are the replicas' business.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_body, error_response
from service.api.generation.sse import encoded_event
from service.api.middleware.record import request_id_of
from service.api.middleware.security import BodyLimit
from service.contract.errors import InternalError, OverloadedError, RequestError, TimedOutError, UnavailableError
from service.settings import load_settings

SESSION_HEADER = "x-session-id"  # Ray's name for what its routers may keep together; a client may send its own
# They read the prefix cache.
GENERATING = frozenset({"/generate", "/compare", "/v1/completions", "/v1/chat/completions"})

_RAYS_OWN = "/-/"  # Ray's probes: /-/healthz, /-/routes
_RAYS_STATUSES = frozenset({404, 408, 429, 500, 503})  # with these it answers for itself, in plain text; we in JSON
_PREFIX_CHARACTERS = 256
_PREFIX_TOKENS = 64

logger = logging.getLogger("xlora")


def middlewares() -> list[Middleware]:
    """Ray's proxies call this when RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it; the last one is outermost."""
    limit = load_settings().max_body_bytes
    return [Middleware(Affinity), Middleware(BodyLimit, max_body_bytes=limit), Middleware(Front)]


class Front:
    """One request id per request, and errors in our shape whatever became of the replica."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_RAYS_OWN):
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope))
        MutableHeaders(scope=scope)["X-Request-Id"] = request_id
        answer = _Answer(send, request_id)
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            logger.exception("%s %s failed in the proxy", scope["method"], scope["path"])
        await answer.finish(scope, receive)


class _Answer:
    """An answer on its way to the client: what Ray says itself is held back, what is missing is added at the end."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._headers = {"X-Request-Id": request_id}
        self._error: RequestError | None = _replica_lost()  # what to say instead; None once an answer of ours began
        self._unfinished_events = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            kind = headers.get("content-type", "")
            if message["status"] in _RAYS_STATUSES and not kind.startswith("application/json"):
                self._error = _rays_error(message["status"], headers)
                return
            self._error = None
            self._unfinished_events = kind.startswith("text/event-stream")
            headers["X-Request-Id"] = self._headers["X-Request-Id"]  # Ray adds a second one
        elif self._error is not None:
            return
        elif not message.get("more_body", False):
            self._unfinished_events = False
        await self._send(message)

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """The proxy has nothing more to say. What else was cut off, the server ends by closing the connection."""
        if self._error is not None:
            await error_response(self._error, self._headers)(scope, receive, self._send)
        elif self._unfinished_events:
            body = encoded_event(error_body(_replica_lost()))
            await self._send({"type": "http.response.body", "body": body, "more_body": False})


class Affinity:
    """Gives requests that begin alike the same session, so that they find each other's keys and values."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; BodyLimit before us has put its body into one message."""
        if scope["type"] != "http" or scope["path"] not in GENERATING or SESSION_HEADER in Headers(scope=scope):
            await self._app(scope, receive, send)
            return
        first = await receive()
        key = prefix_key(first.get("body", b""))
        if key is not None:
            MutableHeaders(scope=scope)[SESSION_HEADER] = key

        async def replay() -> Message:
            nonlocal first
            message, first = first, {}
            return message or await receive()

        await self._app(scope, replay, send)


class _Body(msgspec.Struct):
    prompt: Any = None
    messages: list[dict[str, Any]] | None = None


_decoder = msgspec.json.Decoder(_Body)


def prefix_key(body: bytes) -> str | None:
    """A name for how a request begins; None when that cannot be told, and the replica will say why.

    The first characters or token ids of the (first) prompt; of a conversation, those up to the end of the first user
    message, which all its turns share.
    """
    try:
        parsed = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    begin = _first_turn(parsed.messages) if parsed.messages else _prompt_begin(parsed.prompt)
    return None if begin is None else hashlib.blake2b(repr(begin).encode(), digest_size=16).hexdigest()


def _prompt_begin(prompt: Any) -> str | list[Any] | None:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # several prompts
    if isinstance(prompt, str):
        return prompt[:_PREFIX_CHARACTERS]
    return prompt[:_PREFIX_TOKENS] if isinstance(prompt, list) else None


def _first_turn(messages: list[dict[str, Any]]) -> str:
    text = ""
    for message in messages:
        text += f"{message.get('role')}: {message.get('content')}\n"
        if message.get("role") == "user" or len(text) >= _PREFIX_CHARACTERS:
            break
    return text[:_PREFIX_CHARACTERS]


def _replica_lost() -> InternalError:
    return InternalError(
        "the replica that served this request is lost", code="replica_lost", hint="send the request again"
    )


def _rays_error(status: int, headers: Headers) -> RequestError:
    """The error that Ray's plain text means; it answers for itself only where no replica does."""
    match status:
        case 429:
            error = OverloadedError(
                "every replica is full", hint="try again after the time in Retry-After, or allow more --max-replicas"
            )
            error.retry_after_seconds = int(headers.get("retry-after", "1"))
            return error
        case 408:
            return TimedOutError("the request has reached the timeout of the cluster (request_timeout_s)")
        case 404 | 503:
            return UnavailableError("no replica is serving", hint="the cluster is starting or stopping; try again")
    return _replica_lost()
