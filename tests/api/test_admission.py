"""Bounds on what waits, deadlines, draining: a server that says no cleanly."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.admission import Admission
from service.engine.request import Request, SamplingParams
from service.errors import OverloadedError
from tests.api.conftest import ThreadClient, serving
from tests.api.test_connections import wait_for
from tests.api.test_errors import error_of

PROMPT = list(range(40, 60))


def request(id: str, tokens: int = 10, n: int = 1) -> Request:
    return Request(id, [1] * tokens, SamplingParams(n=n))


def test_a_place_is_free_again_with_the_first_token() -> None:
    admission = Admission(max_choices=3, max_tokens=1000)
    with admission.admit([request("a", n=2)], 0.0) as ticket, admission.admit([request("b")], 0.0):
        with (
            pytest.raises(OverloadedError, match="4 choices would be waiting, and 3 may"),
            admission.admit([request("c")], 0.0),
        ):
            pass
        ticket.started("a", 2.0)
        ticket.started("a", 9.0)
        assert (admission.queued_choices, admission.queued_tokens, admission.running) == (1, 10, 2)
        with admission.admit([request("c", n=2)], 0.0):
            assert admission.queued_choices == 3
    assert (admission.queued_choices, admission.queued_tokens, admission.running) == (0, 0, 0)


def test_tokens_are_bounded_and_what_is_over_a_bound_alone_is_not_refused_for_ever() -> None:
    admission = Admission(max_choices=100, max_tokens=50)
    with admission.admit([request("big", tokens=80)], 0.0), pytest.raises(OverloadedError, match="prompt tokens"):
        admission.admit([request("small", tokens=1)], 0.0).__enter__()


def test_the_time_to_come_again_follows_the_waits() -> None:
    admission = Admission(max_choices=1, max_tokens=50)
    for _ in range(50):
        admission.observe_wait(7.0)
    with admission.admit([request("a")], 0.0), pytest.raises(OverloadedError) as caught:
        admission.admit([request("b")], 0.0).__enter__()
    assert caught.value.retry_after_seconds == 7


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/scalings"])
def test_more_than_may_wait_is_429(client: ThreadClient, path: str) -> None:
    with serving(client, max_queued_requests=2) as http, ThreadPoolExecutor(2) as threads:
        client.engine.step_seconds = 0.2
        body = {"prompt": PROMPT, "max_tokens": 1}
        waiting = [threads.submit(http.post, "/generate", json=body) for _ in range(2)]
        service = http.app.state.service  # type: ignore[attr-defined]
        assert wait_for(lambda: service.admission.queued_choices == 2)
        refused = http.post(path, json=body if path != "/scalings" else {"prompt": PROMPT})
        assert error_of(refused, 429)["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        client.engine.step_seconds = 0
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert http.post("/generate", json=body).status_code == 200
        metrics = http.get("/metrics").text
        assert f'xlora_requests_total{{endpoint="{path}",outcome="rejected"}} 1.0' in metrics


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_after_some_tokens_ends_the_choices(
    http: TestClient, client: ThreadClient, path: str, stream: bool
) -> None:
    client.engine.step_seconds = 0.1
    body = {"prompt": "a", "max_tokens": 90, "timeout": 1, "n": 2, "stream": stream}
    response = http.post(path, json=body)
    assert response.status_code == 200
    assert response.text.count('"finish_reason":"timeout"') == 2
    assert response.text.count('"finish_reason":null') == 0 or stream
    assert wait_for(lambda: not client.engine.choices)
    assert f'xlora_requests_total{{endpoint="{path}",outcome="timeout"}} 1.0' in http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_the_first_token_is_504(http: TestClient, client: ThreadClient, stream: bool) -> None:
    client.engine.step_seconds = 0.6
    body = {"prompt": PROMPT, "timeout": 1, "stream": stream}
    assert error_of(http.post("/generate", json=body), 504)["code"] == "timeout"
    assert wait_for(lambda: not client.engine.choices)


def test_draining_refuses_the_new_and_finishes_the_old(http: TestClient, client: ThreadClient) -> None:
    client.engine.step_seconds = 0.01
    with ThreadPoolExecutor(1) as threads:
        old: Future[Any] = threads.submit(http.post, "/generate", json={"prompt": "a", "max_tokens": 50})
        assert wait_for(lambda: client.engine.choices)
        http.app.state.service.draining = True  # type: ignore[attr-defined]
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert error_of(refused, 503)["code"] == "stopping"
        assert "retry-after" in refused.headers
        assert (http.get("/livez").status_code, http.get("/readyz").status_code) == (200, 503)
        assert http.get("/readyz").json() == {"status": "draining"}
        assert old.result().json()["usage"]["completion_tokens"] == 50


def test_closing_tells_the_unfinished_why(client: ThreadClient) -> None:
    with ThreadPoolExecutor(1) as threads, serving(client) as http:
        client.engine.step_seconds = 0.05
        cut = threads.submit(http.post, "/generate", json={"prompt": "a", "max_tokens": 90})
        assert wait_for(lambda: client.engine.choices)
        started = time.monotonic()
        http.portal.call(client.close)  # type: ignore[union-attr]
        assert error_of(cut.result(), 500)["code"] == "stopping"
        assert time.monotonic() - started < 1
