"""A call ends at its deadline wherever it is: preparing, computing, drawing, or stuck in its client's socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.api.generation.deadlines import deadline_of
from service.api.generation.tokenizer import ModelTokenizer
from service.api.middleware.record import RequestRecord
from service.api.routes.scalings import Renderer
from service.api.schemas.bodies import GenerateBody
from service.api.state import Service
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.api.conftest import ThreadClient, serving
from tests.api.connections.test_connections import post, running
from tests.api.test_errors import error_of
from tests.support.waiting import PATIENCE_SECONDS, wait_for

FORM = {"response_format": {"type": "json_object"}}
CALLS: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/compare": {"prompt": "a", "settings": [{}, {"experts": {"only": []}}]},
    "/scalings": {"prompt": "a"},
}
SEATS = 16


@pytest.fixture
def http(client: ThreadClient) -> Iterator[TestClient]:
    with serving(client) as http:
        service = http.app.state.service  # type: ignore[attr-defined]
        service.settings = service.settings.model_copy(update={"request_timeout": 0.2})  # shorter than may be set
        yield http


async def for_ever(*_: Any) -> None:
    await asyncio.sleep(PATIENCE_SECONDS)


def times_out(http: TestClient, path: str, body: dict[str, Any]) -> None:
    assert error_of(http.post(path, json=body), 504)["code"] == "timeout"
    assert f'xlora_requests_total{{endpoint="{path}",outcome="timeout"}} 1.0' in http.get("/metrics").text


def test_a_deadline_counts_from_the_request_s_arrival() -> None:
    """Not from the moment at which its body was read, its form compiled or its prompt queued."""

    async def left(body: GenerateBody | None) -> float:
        record = RequestRecord("id", "POST", "/generate", started=time.perf_counter() - 50)
        return deadline_of(record, body, 600) - asyncio.get_running_loop().time()

    assert asyncio.run(left(None)) == pytest.approx(550, abs=20)
    assert asyncio.run(left(GenerateBody(prompt="a", timeout=100))) == pytest.approx(50, abs=20)
    assert asyncio.run(left(GenerateBody(prompt="a", timeout=10))) == pytest.approx(-40, abs=20)


@pytest.mark.parametrize("path", [path for path in CALLS if path != "/scalings"])
def test_a_form_that_compiles_too_long(http: TestClient, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The queue of new forms may be longer than a caller wants to wait."""

    class Forms:
        of = for_ever

    monkeypatch.setattr(Service, "forms", property(lambda service: Forms()))
    times_out(http, path, CALLS[path] | FORM | ({} if path == "/compare" else {"stream": True}))


@pytest.mark.parametrize("path", CALLS)
def test_a_prompt_that_is_read_too_long(http: TestClient, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(ModelTokenizer, "prompt_ids", for_ever)
    monkeypatch.setattr(ModelTokenizer, "all_prompt_ids", for_ever)
    monkeypatch.setattr(ModelTokenizer, "chat_ids", for_ever)
    times_out(http, path, CALLS[path])


def test_an_answer_that_is_drawn_too_long(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread cannot be ended; nobody waits for it."""
    end = threading.Event()
    monkeypatch.setattr(Renderer, "render", lambda *_: end.wait(PATIENCE_SECONDS) and b"")
    times_out(http, "/scalings", CALLS["/scalings"])
    end.set()


@pytest.mark.parametrize("path", CALLS)
def test_an_engine_that_computes_too_long(http: TestClient, client: ThreadClient, path: str) -> None:
    client.engine.step_seconds = 0.6
    times_out(http, path, CALLS[path])
    assert http.app.state.service.admission.running == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "wishes", "n"),
    [
        ("/generate", {"logprobs": 20}, 2),
        ("/generate", {"logprobs": 20}, SEATS),
        ("/v1/completions", {"logprobs": 5}, SEATS),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 20}, SEATS),
    ],
)
def test_a_reader_that_never_reads_gives_all_back(
    client: ThreadClient, caplog: pytest.LogCaptureFixture, path: str, wishes: dict[str, Any], n: int
) -> None:
    """Its stream ended for everybody but for the queue's accounts: others got 429 as long as its socket was open."""
    client.engine.burst = 4  # the engine has soon done its part
    body = CALLS[path] | wishes | {"max_tokens": 80, "n": n, "stream": True, "timeout": 2}
    settings, another = Settings(max_num_seqs=SEATS, max_queued_requests=1), {"prompt": "a", "max_tokens": 1, "n": 2}
    app = create_app(client, settings, Metrics(CollectorRegistry()))
    admission = app.state.service.admission
    with running(client, settings, app, send_buffer_bytes=2048) as address, ExitStack() as stack:
        url = f"http://{address[0]}:{address[1]}"
        warm = httpx.post(f"{url}{path}", json=CALLS[path] | {"max_tokens": 1}, timeout=PATIENCE_SECONDS, verify=False)
        assert warm.status_code == 200  # so that what a first request waits for is there: all readers come in time
        readers = [stack.enter_context(never_reads(address, path, body)) for _ in range(SEATS // n + 1)]
        assert wait_for(lambda: admission.running == len(readers)), (
            "another one that came earlier would be in their way"
        )
        assert httpx.post(f"{url}/generate", json=another, verify=False).status_code == 429
        assert wait_for(lambda: httpx.post(f"{url}/generate", json=another, verify=False).status_code == 200)
        assert wait_for(lambda: not client.engine.choices)
        outcome = f'xlora_requests_total{{endpoint="{path}",outcome="timeout"}} {len(readers)}.0'
        assert wait_for(lambda: outcome in httpx.get(f"{url}/metrics", verify=False).text)
        assert wait_for(lambda: not {reader.getsockname() for reader in readers} & peers(address))
    assert "ASGI callable" not in caplog.text


def never_reads(address: tuple[str, int], path: str, body: dict[str, Any]) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(address)
    request = post(json.dumps(body).encode(), path)
    connection.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))  # also where the end is in time
    return connection


def peers(address: tuple[str, int]) -> set[tuple[str, int]]:
    """To whom the server, in this process, has connections."""
    found = psutil.Process().net_connections("tcp")
    return {tuple(one.raddr) for one in found if one.laddr == address and one.status != psutil.CONN_LISTEN}
