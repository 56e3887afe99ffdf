"""Whatever is raised, wherever, becomes an error in our shape, with the request's id, and one record in the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, BeforeValidator
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.app import create_app
from service.api.logs import JsonFormatter
from service.contract.errors import OverloadedError
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.api.conftest import ThreadClient, serving, wait_until_ready
from tests.api.connections.test_connections import running
from tests.api.middleware.test_security import ask
from tests.api.test_errors import error_of

SECRET = "xyzzy"


class Panic(BaseException):
    """As pyo3's PanicException, with which tokenizers and others fail."""


SURPRISES = [
    ZeroDivisionError(SECRET),
    OverflowError(SECRET),
    RecursionError(SECRET),
    MemoryError(SECRET),
    LookupError(SECRET),
    StopAsyncIteration(SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET)]),
    BaseExceptionGroup(SECRET, [Panic(SECRET)]),
    Panic(SECRET),
    SystemExit(SECRET),
]


def app_with(client: ThreadClient, endpoint: Any, path: str = "/fails", method: str = "POST") -> FastAPI:
    """The application with one route more."""
    app = create_app(client, Settings(), Metrics(CollectorRegistry()))
    app.add_api_route(path, endpoint, methods=[method], response_model=None)
    return app


@contextmanager
def asking(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as http:  # which raises whatever leaves the application
        wait_until_ready(http)
        yield http


def surprises(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [json.loads(JsonFormatter().format(record)) for record in records]


@pytest.mark.parametrize("surprise", SURPRISES, ids=lambda surprise: type(surprise).__name__)
@pytest.mark.parametrize("where", ["handler", "validator", "middleware", "answer"])
def test_a_surprise_is_a_500_and_one_record(
    client: ThreadClient, caplog: pytest.LogCaptureFixture, surprise: BaseException, where: str
) -> None:
    def fail(value: object = None) -> Any:
        raise surprise

    class Failing(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            fail()

    class Body(BaseModel):
        field: Annotated[int, BeforeValidator(fail if where == "validator" else lambda value: 1)]

    class FailingMiddleware:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await (self._app(scope, receive, send) if scope.get("path") != "/fails" else fail())

    async def fails(body: Body) -> Response:
        return Failing() if where == "answer" else fail()

    fails.__annotations__["body"] = Body
    app = app_with(client, fails)
    if where == "middleware":
        app.user_middleware.append(Middleware(FailingMiddleware))
    with asking(app) as http:
        answer = http.post("/fails", json={"field": 1}, headers={"X-Request-Id": "mine"})
        assert error_of(answer, 500)["message"] == "an internal error occurred"
        assert SECRET not in answer.text
        assert answer.headers["x-request-id"] == "mine"
        (line,) = surprises(caplog)
        assert (line["level"], line["request_id"], line["message"]) == ("error", "mine", "POST /fails failed")
        assert type(surprise).__name__ in line["exception"]
        assert SECRET in line["exception"]
        assert http.get("/readyz").status_code == 200


def test_an_error_of_ours_keeps_its_words_wherever_it_is_raised(
    client: ThreadClient, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == "/tokenize":
                raise OverloadedError("full")
            await self._app(scope, receive, send)

    app = create_app(client, Settings(), Metrics(CollectorRegistry()))
    app.user_middleware.append(Middleware(Full))
    with asking(app) as http:
        answer = http.post("/tokenize", json={"text": "a"})
        assert error_of(answer, 429)["message"] == "full"
        assert answer.headers["retry-after"] == "1"
        assert 'endpoint="/tokenize",outcome="rejected"} 1.0' in http.get("/metrics").text
    assert surprises(caplog) == []


@pytest.mark.parametrize("status", [400, 401, 403, 409, 415, 416, 418, 422, 431, 499, 500, 501, 503])
@pytest.mark.parametrize("raised", [False, True])
def test_an_error_in_a_library_s_words_is_put_into_ours(client: ThreadClient, status: int, raised: bool) -> None:
    async def refuses() -> Response:
        if raised:
            raise HTTPException(status, SECRET, {"X-Kept": "yes"})
        return PlainTextResponse(SECRET, status, {"X-Kept": "yes"})

    with asking(app_with(client, refuses, method="GET")) as http:
        answer = http.get("/fails")
        error_of(answer, status if status < 500 else 500)
        assert SECRET not in answer.text
        assert answer.headers["x-kept"] == "yes"
        assert answer.headers["content-length"] == str(len(answer.content))


def test_the_libraries_own_refusals_have_our_shape(client: ThreadClient) -> None:
    with serving(client, cors_origins="https://a.example") as http:
        preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        error_of(http.options("/generate", headers=preflight))
        assert error_of(http.get("/web/index.html", headers={"Range": "bytes=99999999-"}), 416)
        assert error_of(http.get("/web/index.html", headers={"Range": "lines=1"}))
        assert error_of(http.post("/web/index.html"), 405)["hint"] == "use GET, HEAD"
        assert http.get("/web/index.html", headers={"Range": "bytes=0-3"}).status_code == 206


def test_a_surprise_amid_events_is_an_event(client: ThreadClient, caplog: pytest.LogCaptureFixture) -> None:
    """And nothing else is said of it: uvicorn's word for an answer without an end is a second record."""

    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]

    with serving_over_socket(client, breaks_off(headers, b'data: {"first": 1}\n\n')) as address:
        answer = httpx.get(f"http://{address[0]}:{address[1]}/fails")
        assert answer.status_code == 200
        last = json.loads(answer.text.split("data: ")[-1])
        assert last["error"]["code"] == "internal_error"
        assert SECRET not in answer.text
    (line,) = surprises(caplog)
    assert "ZeroDivisionError" in line["exception"]


def test_an_answer_that_breaks_off_is_closed_and_one_record(
    client: ThreadClient, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_over_socket(client, breaks_off([(b"content-length", b"9")], b"half")) as address:
        answer = ask(address, b"GET /fails HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.endswith(b"half")
    assert len(surprises(caplog)) == 1


def test_a_request_that_the_server_cuts_off_is_told_so(client: ThreadClient, caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> Response:
        raise asyncio.CancelledError

    with asking(app_with(client, fails, method="GET")) as http:
        assert error_of(http.get("/fails"), 500)["code"] == "stopping"
    assert surprises(caplog) == []


def breaks_off(headers: list[tuple[bytes, bytes]], body: bytes) -> Any:
    """An endpoint whose answer begins well."""

    class Broken(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            raise ZeroDivisionError(SECRET)

    async def endpoint() -> Response:
        return Broken()

    return endpoint


@contextmanager
def serving_over_socket(client: ThreadClient, endpoint: Any) -> Iterator[tuple[str, int]]:
    with running(client, Settings(), app_with(client, endpoint, method="GET")) as address:
        yield address
