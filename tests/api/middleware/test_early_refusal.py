"""What cannot be admitted is refused before its body is read or parsed, and the connection goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.api.generation.admission import Admission
from service.contract.errors import OverloadedError
from service.contract.request import Request, SamplingParams
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.api.conftest import ThreadClient, serving
from tests.api.connections.test_connections import running
from tests.api.middleware.test_security import KEY, bearer
from tests.api.test_errors import JSON, error_of
from tests.support.fake_engine import POISON
from tests.support.waiting import PATIENCE_SECONDS

GENERATING = ["/generate", "/compare", "/scalings", "/v1/completions", "/v1/chat/completions"]
BROKEN = b'{"prompt": '


@contextmanager
def full(book: Admission) -> Iterator[None]:
    """One runs and one waits, and no more may."""
    with book.admit([Request("held", [1], SamplingParams(max_tokens=128, n=2))], 0.0):
        yield


def book_of(http: TestClient) -> Admission:
    book: Admission = http.app.state.service.admission  # type: ignore[attr-defined]
    return book


@pytest.mark.parametrize("path", GENERATING)
def test_a_body_is_not_parsed_while_nothing_can_be_admitted(client: ThreadClient, path: str) -> None:
    with serving(client, max_num_seqs=1, max_queued_requests=1, cors_origins="https://a.example") as http:
        assert error_of(http.post(path, content=BROKEN, headers=JSON))["code"] == "invalid_json"
        with full(book_of(http)):
            answer = http.post(path, content=BROKEN, headers=JSON | {"Origin": "https://a.example"})
            error = error_of(answer, 429)
            assert error["message"] == "the server is full: 2 choices would be waiting, and 1 may"
            assert "--max-queued-requests" in error["hint"]
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.headers["x-request-id"]
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            assert f'endpoint="{path}",outcome="rejected"}} 1.0' in http.get("/metrics").text
            assert http.get(path).status_code == 405
            assert http.post("/tokenize", json={"text": "a"}).status_code == 200
        assert error_of(http.post(path, content=BROKEN, headers=JSON))["code"] == "invalid_json"


def test_a_key_is_asked_for_first(client: ThreadClient) -> None:
    with serving(client, max_num_seqs=1, max_queued_requests=1, api_keys=KEY) as http, full(book_of(http)):
        assert http.post("/generate", content=BROKEN).status_code == 401
        assert http.post("/generate", content=BROKEN, headers=bearer(KEY)).status_code == 429


def test_while_it_loads_or_stops_or_is_dead_no_body_is_parsed(client: ThreadClient) -> None:
    client.release.clear()
    app = create_app(client, Settings(), Metrics(CollectorRegistry()))
    with TestClient(app) as http:
        assert "loading" in error_of(http.post("/generate", content=BROKEN), 503)["message"]
        client.release.set()
    with serving(ThreadClient(client.engine)) as http:
        http.app.state.service.refusing = True  # type: ignore[attr-defined]
        assert error_of(http.post("/scalings", content=BROKEN), 503)["code"] == "stopping"
        http.app.state.service.refusing = False  # type: ignore[attr-defined]
        assert error_of(http.post("/generate", json={"prompt": [POISON]}), 500)["code"] == "engine_dead"
        answer = http.post("/generate", content=BROKEN)
        assert error_of(answer, 503)["code"] == "engine_dead"
        assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("choices", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("tokens", [0, 1, 9, 10, 11])
def test_what_refuses_the_least_refuses_everything(choices: int, tokens: int) -> None:
    """And what does not, admits the least."""
    book = Admission(2, 2, 10)
    book.choices, book.queued_tokens = choices, tokens

    def refuses(*ask: int) -> bool:
        try:
            book.check(*ask)
        except OverloadedError:
            return True
        return False

    larger = [(more, many) for more in (1, 2, 7) for many in (1, 5, 99)]
    assert not refuses() or all(refuses(*ask) for ask in larger)
    assert refuses() == refuses(1, 1)
    if not refuses():
        with book.admit([Request("least", [1], SamplingParams(max_tokens=128))], 0.0):
            assert book.choices == choices + 1


def read_answer(reader: BinaryIO) -> tuple[int, dict[bytes, bytes], bytes]:
    status = int(reader.readline().split()[1])
    headers: dict[bytes, bytes] = {}
    while line := reader.readline().strip():
        name, _, value = line.partition(b": ")
        headers[name.lower()] = value
    return status, headers, reader.read(int(headers[b"content-length"]))


@pytest.mark.parametrize("size", [2, 100, 1 << 20, 4 << 20])
@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_the_connection_goes_on(client: ThreadClient, size: int, expect: bytes) -> None:
    """The refused body follows its head at once, and the next request follows that."""
    settings = Settings(max_num_seqs=1, max_queued_requests=1)
    app = create_app(client, settings, Metrics(CollectorRegistry()))
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n" % (expect, size)
    with running(client, settings, app) as address, full(app.state.service.admission):
        for _ in range(3):
            with (
                socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection,
                connection.makefile("rb") as reader,
            ):
                for _ in range(3):
                    connection.sendall(head + b"[" * size)
                    status, headers, body = read_answer(reader)
                    assert (status, headers.get(b"connection")) == (429, None)
                    assert json.loads(body)["error"]["code"] == "overloaded"
                    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert read_answer(reader)[0] == 200


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"Transfer-Encoding: chunked\r\n", b"5\r\n[[[[[\r\n" * 20_000 + b"0\r\n\r\n"),
        (b"Content-Length: 5000000\r\n", b"[" * 5_000_000),
    ],
    ids=["chunks", "over the limit"],
)
def test_a_body_without_a_permitted_length_ends_the_connection(
    client: ThreadClient, framing: bytes, body: bytes
) -> None:
    """After the answer, which reaches the client: nobody reads a body to an end that it has not promised."""
    settings = Settings(max_num_seqs=1, max_queued_requests=1, max_body_bytes=1 << 20)
    app = create_app(client, settings, Metrics(CollectorRegistry()))
    with (
        running(client, settings, app) as address,
        full(app.state.service.admission),
        socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection,
        connection.makefile("rb") as reader,
    ):
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n" + body)
        status, headers, _ = read_answer(reader)
        assert (status, headers[b"connection"]) == (429, b"close")
        assert reader.read() == b""
