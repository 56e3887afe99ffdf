"""A real server on a real socket: clients that go away, giant bodies, many streams at once."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.api.connections.open_connections import OpenConnections
from service.commands.serve import Server, configuration
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.api.conftest import ThreadClient
from tests.support.waiting import wait_for


@contextmanager
def running(
    client: ThreadClient, settings: Settings, app: FastAPI | None = None, *, send_buffer_bytes: int = 0
) -> Iterator[tuple[str, int]]:
    """uvicorn as the serve command sets it up, in a thread; with a kernel that holds little of what is sent. `app` is
    an application of `client` that was changed.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer_bytes:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    app = app or create_app(client, settings, Metrics(CollectorRegistry()))
    connections = OpenConnections()
    server = Server(configuration(app, settings, connections), app.state.service, connections)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    host, port = listener.getsockname()
    try:
        # verify: httpx reads the machine's certificates even for http, 40 ms of CPU time at each call
        while httpx.get(f"http://{host}:{port}/readyz", verify=False).status_code != 200:
            time.sleep(0.01)
        yield host, port
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture
def address(client: ThreadClient) -> Iterator[tuple[str, int]]:
    client.engine.step_seconds = 0.005
    with running(client, Settings()) as address:
        yield address


def post(body: bytes, path: str = "/generate") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def send(address: tuple[str, int], body: bytes, path: str = "/generate") -> socket.socket:
    connection = socket.create_connection(address)
    connection.sendall(post(body, path))
    return connection


LONG = {"prompt": "a", "max_tokens": 90}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", LONG),
        ("/generate", LONG | {"stream": True}),
        ("/v1/completions", LONG),
        ("/compare", LONG | {"settings": [{}]}),
        ("/scalings", {"prompt": [80] * 90}),
    ],
)
def test_a_client_that_goes_away_costs_no_further_step(
    address: tuple[str, int], client: ThreadClient, path: str, body: dict[str, object]
) -> None:
    client.engine.step_seconds = 0.03
    connection = send(address, json.dumps(body).encode(), path)
    assert wait_for(lambda: client.engine.choices)
    if "stream" in body:
        connection.recv(1000)
    connection.close()
    assert wait_for(lambda: not client.engine.choices)
    assert len(client.engine.aborted) == 1, "it was generated to its end"
    outcome = f'xlora_requests_total{{endpoint="{path}",outcome="cancelled"}} 1.0'
    url = f"http://{address[0]}:{address[1]}/metrics"
    assert wait_for(lambda: outcome in httpx.get(url, verify=False).text)


def test_a_client_that_has_asked_twice_at_once_and_goes_away(address: tuple[str, int], client: ThreadClient) -> None:
    """uvicorn tells the second request, which has not begun; the first went on for nobody."""
    client.engine.step_seconds = 0.05
    request = post(json.dumps({"prompt": "a", "max_tokens": 90, "stream": True}).encode())
    with socket.create_connection(address) as connection:
        connection.sendall(request + request)
        assert wait_for(lambda: client.engine.choices)
    assert wait_for(lambda: not client.engine.choices)
    assert len(client.engine.requests) == 2  # the warm-up's, and the first
    assert len(client.engine.aborted) == 1, "it was generated to its end"


def test_a_comparison_ends_when_its_client_goes(address: tuple[str, int], client: ThreadClient) -> None:
    """While the texts are written, and while they are judged."""
    engine = client.engine
    engine.step_seconds = 0.1
    given = {"token_ids": [90] * 70}
    written = {"max_tokens": 60, "settings": [{}, {"experts": {"only": []}}]}
    for fields, scores in ((written, False), ({"settings": [given]}, True)):
        before = len(engine.requests)
        connection = send(address, json.dumps({"prompt": [80]} | fields).encode(), "/compare")
        assert wait_for(lambda before=before: len(engine.requests) > before)
        assert (engine.requests[-1].score_from is not None) == scores
        connection.close()
        assert wait_for(lambda: not engine.choices)
        assert {one.id for one in engine.requests[before:]} <= {id for id, _ in engine.aborted}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_are_refused_unread(address: tuple[str, int], chunked: bool) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1 << 20
            yield b"a" * (1 << 20)

    headers = {"Content-Type": "application/json"} | ({} if chunked else {"Content-Length": str(100 << 20)})
    try:
        response = httpx.post(f"http://{address[0]}:{address[1]}/generate", content=body(), headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "payload_too_large"
    except httpx.WriteError:  # the server closed before all was sent: httpx cannot read the answer then
        assert sent < 60 << 20


def test_the_refusal_reaches_a_client_that_reads_it(address: tuple[str, int]) -> None:
    connection = socket.create_connection(address)
    connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n" + b"a" * 100_000)
    answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")
    connection.close()


def test_streams_do_not_mix(address: tuple[str, int]) -> None:
    async def one(http: httpx.AsyncClient, length: int) -> str:
        text = ""
        body = {"prompt": "a", "max_tokens": length, "stream": True}
        async with http.stream("POST", "/generate", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:]).get("text", "")
        return text

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}", limits=limits, timeout=30) as http:
            return await asyncio.gather(*(one(http, 1 + index) for index in range(40)))

    texts = asyncio.run(run())
    longest = texts[-1]
    assert all(longest.startswith(text.rstrip("\ufffd")) for text in texts)
    assert len({len(text) for text in texts}) > 30
