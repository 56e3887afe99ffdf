"""Bounds on what waits, deadlines, draining: a server that says no cleanly."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.generation.admission import Admission
from service.api.state import Service
from service.contract.errors import OverloadedError
from service.contract.request import Request, SamplingParams
from service.settings import Settings
from tests.api.conftest import ThreadClient, serving
from tests.api.test_errors import error_of
from tests.support.waiting import wait_for

PROMPT = list(range(40, 60))


def request(id: str, tokens: int = 10, n: int = 1) -> Request:
    return Request(id, [1] * tokens, SamplingParams(max_tokens=128, n=n))


def admission(slots: int = 2, waiting: int = 3, tokens: int = 1000) -> Admission:
    return Admission(slots, waiting, tokens)


def refused(book: Admission, *requests: Request) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        book.admit(requests, 0.0).__enter__()
    return caught.value


def test_those_beyond_the_seats_wait_and_are_bounded() -> None:
    """A place is free again when a choice has ended, not with a first token."""
    book = admission(slots=2, waiting=3)
    with book.admit([request("a", n=2)], 0.0) as permit, book.admit([request("b", n=3)], 0.0):
        assert (book.choices, book.waiting, book.running) == (5, 3, 2)
        assert refused(book, request("c")).message == "the server is full: 4 choices would be waiting, and 3 may"
        permit.started("a")
        refused(book, request("c"))
        permit.ended(1.0, 0.0)
        with book.admit([request("c")], 0.0):
            assert book.waiting == 3
    assert (book.choices, book.waiting, book.queued_tokens, book.running) == (0, 0, 0, 0)


def test_a_burst_at_an_idle_server_fills_seats_and_queue() -> None:
    """By default half as many wait as run."""
    book = admission(slots=64, waiting=Settings(max_num_seqs=64).max_waiting)
    permits = [book.admit([request(str(number))], 0.0) for number in range(96)]
    for permit in permits:
        permit.__enter__()
    refused(book, request("late"))
    for permit in permits:
        permit.__exit__(None, None, None)
    assert (book.choices, book.waiting, book.running) == (0, 0, 0)


def test_tokens_are_queued_until_the_first_token() -> None:
    book = admission(tokens=50)
    with book.admit([request("big", tokens=80)], 0.0) as permit:
        assert "81 prompt tokens would be waiting, and 50 may" in refused(book, request("small", tokens=1)).message
        permit.started("big")
        permit.started("big")
        with book.admit([request("small", tokens=1)], 0.0):
            assert book.queued_tokens == 1


def test_what_is_over_a_bound_alone_is_not_refused_for_ever() -> None:
    book = admission(slots=2, waiting=3)
    with book.admit([request("running", n=2)], 0.0), book.admit([request("large", n=50)], 0.0):
        assert book.waiting == 50
        refused(book, request("next"))


def test_the_time_to_come_again_is_that_of_the_queue() -> None:
    """Two slots, 7 s a choice after its wait: one is free every 3.5 s, and three wait already."""
    book = admission(slots=2, waiting=3)
    with book.admit([request("warm", n=50)], 0.0) as permit:
        for _ in range(50):
            permit.ended(9.0, queue_seconds=2.0)
    assert book.expected_wait_seconds == 0
    with book.admit([request("a", n=5)], 0.0):
        assert book.expected_wait_seconds == pytest.approx(14.0)
        assert refused(book, request("b")).retry_after_seconds == 14


def test_the_time_to_come_again_is_bounded() -> None:
    book = admission(slots=1, waiting=1)
    with book.admit([request("a", n=9)], 0.0) as permit:
        assert refused(book, request("c")).retry_after_seconds == 1  # nothing is known yet
        permit.ended(1000.0, 0.0)
        assert refused(book, request("c")).retry_after_seconds == 60


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/scalings"])
def test_more_than_may_wait_is_429(client: ThreadClient, path: str) -> None:
    with serving(client, max_num_seqs=1, max_queued_requests=1) as http, ThreadPoolExecutor(2) as threads:
        client.engine.step_seconds = 0.2
        body = {"prompt": PROMPT, "max_tokens": 1}
        waiting = [threads.submit(http.post, "/generate", json=body) for _ in range(2)]
        service = http.app.state.service  # type: ignore[attr-defined]
        assert wait_for(lambda: service.admission.choices == 2)
        answer = http.post(path, json=body if path != "/scalings" else {"prompt": PROMPT})
        error = error_of(answer, 429)
        assert (error["code"], error["type"], error["param"]) == ("overloaded", "overloaded_error", None)
        assert "--max-queued-requests" in error["hint"]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        client.engine.step_seconds = 0
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert http.post("/generate", json=body).status_code == 200
        metrics = http.get("/metrics").text
        assert f'xlora_requests_total{{endpoint="{path}",outcome="rejected"}} 1.0' in metrics


def test_overload_passes_without_a_trace(client: ThreadClient) -> None:
    """Four times too many: whoever is admitted is answered, and then the queue is as empty as it was."""
    with serving(client, max_num_seqs=2, max_queued_requests=2) as http, ThreadPoolExecutor(16) as threads:
        client.engine.step_seconds = 0.01
        book = http.app.state.service.admission  # type: ignore[attr-defined]
        for _ in range(3):
            sent = [threads.submit(http.post, "/generate", json={"prompt": "a", "max_tokens": 8}) for _ in range(16)]
            statuses = Counter(one.result().status_code for one in sent)
            assert set(statuses) == {200, 429}
            assert statuses[200] >= 4
            assert wait_for(lambda: not client.engine.choices)
            assert (book.choices, book.queued_tokens, book.running) == (0, 0, 0)
        assert http.post("/generate", json={"prompt": "a", "max_tokens": 8}).status_code == 200


def test_ended_choices_give_their_places_up_before_the_call_ends(client: ThreadClient) -> None:
    """One choice ends by its stop string; its sibling goes on."""
    with serving(client) as http, ThreadPoolExecutor(1) as threads:
        client.engine.step_seconds = 0.02
        book = http.app.state.service.admission  # type: ignore[attr-defined]
        body = {"prompt": "a", "max_tokens": 80, "n": 2, "stop": ["42, "]}
        call = threads.submit(http.post, "/generate", json=body)
        assert wait_for(lambda: book.choices == 2)
        assert wait_for(lambda: book.choices == 1)
        assert book.running == 1
        assert call.result().status_code == 200
        assert wait_for(lambda: book.choices == 0)


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
        service: Service = http.app.state.service  # type: ignore[attr-defined]
        service.draining = True
        assert http.get("/readyz").json() == {"status": "draining"}
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        service.refusing = True
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
        http.portal.call(client.close)  # type: ignore[union-attr]
        assert error_of(cut.result(), 500)["code"] == "stopping"
        assert client.engine.choices, "it heard only when its last token was made"
