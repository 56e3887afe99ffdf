"""GET, PATCH and DELETE /gate, and /scalings/log, over the fake engine; and the ring behind the log."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.api.gate_views.scalings_log import ScalingsLog
from service.contract.errors import InvalidRequestError
from service.contract.output import LoggedRows
from service.contract.steering import GateSettings
from tests.api.conftest import ThreadClient, serving
from tests.support.fake_engine import EXPERTS, POISON, SITES, FakeEngine, gate_row

STORED = {"scaling_pass_value": 0.0, "top_k_lora": None, "global_scaling_weight": 1.0}
PATHS = [("GET", "/gate"), ("PATCH", "/gate"), ("DELETE", "/gate"), ("GET", "/scalings/log"), ("PUT", "/scalings/log"),
         ("DELETE", "/scalings/log"), ("GET", "/scalings/log.npz")]  # fmt: skip


def settle(http: TestClient) -> None:
    """Until the engine has done what was asked before."""
    http.post("/generate", json={"prompt": [80], "max_tokens": 1})


def test_gate_is_changed_field_by_field(http: TestClient, engine: FakeEngine) -> None:
    """What is absent stays; null is 1/E and all, as in PEFT's setters; DELETE is the checkpoint's again."""
    assert http.get("/gate").json() == {**STORED, "checkpoint": STORED}
    assert http.patch("/gate", json={"top_k_lora": 2}).json() == {**STORED, "top_k_lora": 2, "checkpoint": STORED}
    changed = {"scaling_pass_value": None, "top_k_lora": 2, "global_scaling_weight": -0.5}
    answer = http.patch("/gate", json={"scaling_pass_value": None, "global_scaling_weight": -0.5}).json()
    assert answer == {**changed, "checkpoint": STORED}
    assert http.patch("/gate", json={}).json() == answer == http.get("/gate").json() == http.get("/info").json()["gate"]
    assert http.delete("/gate").json() == {**STORED, "checkpoint": STORED}
    settle(http)
    assert engine.gates[1] == GateSettings(None, 2, -0.5)
    assert engine.gates[-1] == GateSettings(0.0, None, 1.0)


@pytest.mark.parametrize(("wrong", "param"), [
    ({"top_k_lora": 0}, "top_k_lora"),
    ({"top_k_lora": 4}, "top_k_lora"),
    ({"scaling_pass_value": 1e3}, "scaling_pass_value"),
    ({"global_scaling_weight": None}, "global_scaling_weight"),
    ({"global_scaling_weight": "1"}, "global_scaling_weight"),
    ({"topk": 2}, "topk"),
])  # fmt: skip
def test_a_wrong_change_changes_nothing(http: TestClient, engine: FakeEngine, wrong: Any, param: str) -> None:
    answer = http.patch("/gate", json={"scaling_pass_value": 0.1, **wrong})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert http.get("/gate").json()["scaling_pass_value"] == 0.0
    settle(http)
    assert engine.gates == []


def test_where_there_are_admin_keys_they_are_needed(client: ThreadClient) -> None:
    with serving(client, api_keys="user-key-1", admin_keys="admin-key-1") as http:
        for method, path in PATHS:
            for key, refused in ((None, True), ("user-key-1", True), ("admin-key-1", False)):
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                assert (http.request(method, path, headers=headers).status_code == 401) == refused, path


def test_log_is_off_until_switched_on(http: TestClient, engine: FakeEngine) -> None:
    """Rows of requests afterwards; off keeps them, clear forgets them."""
    settle(http)
    off = http.get("/scalings/log").json()
    assert (off["enabled"], off["tokens"], off["sequences"], off["totals"]) == (False, 0, 0, None)
    on = http.put("/scalings/log", json={"enabled": True, "max_tokens": 100}).json()
    assert (on["enabled"], on["max_tokens"], on["max_bytes"]) == (True, 100, 64 << 20)
    http.post("/generate", json={"prompt": [80], "max_tokens": 7})
    summary = http.get("/scalings/log").json()
    assert (summary["tokens"], summary["lengths"]) == (6, {"6": 1})
    rows = np.stack([gate_row(position) for position in range(6)])
    assert summary["totals"] == pytest.approx(dict(zip(EXPERTS, rows.mean(axis=(0, 1)), strict=True)))
    assert http.put("/scalings/log", json={"enabled": False}).json()["tokens"] == 6
    http.post("/generate", json={"prompt": [80], "max_tokens": 7})
    assert http.get("/scalings/log").json()["tokens"] == 6
    arrays = np.load(io.BytesIO(http.get("/scalings/log.npz").content), allow_pickle=False)
    np.testing.assert_array_equal(arrays["scalings_6"], rows[None])
    assert arrays["experts"].tolist() == EXPERTS
    assert arrays["request_6"][0].startswith("gen-")
    assert http.delete("/scalings/log").json()["tokens"] == 0
    assert set(np.load(io.BytesIO(http.get("/scalings/log.npz").content))) == {"experts", "sites"}


@pytest.mark.parametrize("wrong", [{}, {"enabled": True, "max_tokens": 0}, {"enabled": True, "max_bytes": 1 << 40},
                                   {"enabled": True, "max_bytes": 8}, {"enabled": True, "rows": 5},
                                   {"enabled": False, "max_tokens": 5}])  # fmt: skip
def test_log_refuses(http: TestClient, engine: FakeEngine, wrong: dict[str, Any]) -> None:
    assert http.put("/scalings/log", json=wrong).status_code == 400
    settle(http)
    assert not engine.logs_scalings


# -- the ring --------------------------------------------------------------------------------------------------------


def rows_of(request: str, start: int, count: int, choice: int = 0) -> LoggedRows:
    """Rows that say whose they are: every weight is 1000 * the request's number + position."""
    values = np.arange(start, start + count, dtype=np.float32) + 1000 * int(request[1:])
    rows = np.broadcast_to(values[:, None, None], (count, len(SITES), len(EXPERTS)))
    return LoggedRows(request, choice, start, count, np.ascontiguousarray(rows).tobytes())


@pytest.fixture
def log(engine: FakeEngine) -> ScalingsLog:
    return ScalingsLog(engine.info)


def runs(log: ScalingsLog) -> list[tuple[str, int, int, int]]:
    found = []
    for run in log.snapshot().runs():
        expected = np.arange(run.start, run.start + len(run.rows)) + 1000 * int(run.request[1:])
        assert (run.rows == expected[:, None, None]).all(), "rows under another's name"
        found.append((run.request, run.choice, run.start, len(run.rows)))
    return found


def test_bounds_are_of_tokens_and_of_bytes(log: ScalingsLog) -> None:
    """The smaller one counts, memory is taken for no more, and the newest rows stay."""
    for tokens, size, expected in [(10, 1 << 20, 10), (1000, 7 * log.row_bytes + 1, 7)]:
        log.clear()
        log.enable(tokens, size)
        for start in range(0, 40, 2):
            log.add([rows_of("r1", start, 2)])
        assert runs(log) == [("r1", 0, 40 - expected, expected)]
        assert log._ring.rows.nbytes + log._ring.owners.nbytes == expected * log.row_bytes <= size
        assert log.state()["dropped_tokens"] == 40 - expected
        log.add([rows_of("r2", 0, 100)])
        assert runs(log) == [("r2", 0, 100 - expected, expected)]
    with pytest.raises(InvalidRequestError):
        log.enable(10, log.row_bytes - 1)


def test_interleaved_requests_come_apart(log: ScalingsLog) -> None:
    """In the order of their first rows; a gap begins another run; choices are not mixed up."""
    log.enable(100, 1 << 20)
    log.add([rows_of("r2", 5, 3), rows_of("r1", 0, 2)])
    log.add([rows_of("r1", 2, 1), rows_of("r2", 8, 1), rows_of("r1", 2, 1, choice=1)])
    log.add([rows_of("r1", 7, 2)])
    assert runs(log) == [("r2", 0, 5, 4), ("r1", 0, 0, 3), ("r1", 0, 7, 2), ("r1", 1, 2, 1)]
    assert log.snapshot().summary()["lengths"] == {"1": 1, "2": 1, "3": 1, "4": 1}
    arrays = np.load(io.BytesIO(log.snapshot().npz()))
    assert (arrays["order_4"], arrays["start_4"], arrays["request_4"]) == ([0], [5], ["r2"])


def test_other_bounds_keep_the_newest_rows(log: ScalingsLog) -> None:
    log.enable(10, 1 << 20)
    log.add([rows_of("r1", 0, 8)])
    log.enable(5, 1 << 20)
    assert runs(log) == [("r1", 0, 3, 5)]
    log.enable(50, 1 << 20)
    log.add([rows_of("r1", 8, 8)])
    assert runs(log) == [("r1", 0, 3, 13)]
    log.disable()
    log.add([rows_of("r1", 16, 8)])
    assert runs(log) == [("r1", 0, 3, 13)]
    log.clear()
    assert (runs(log), log._ring.rows.nbytes) == ([], 0), "the memory is given back"


def test_a_snapshot_is_of_its_moment_without_what_is_written_over(log: ScalingsLog) -> None:
    """It is copied later, in another thread: rows that came after it are not in it, nor those that they replaced."""
    log.enable(10, 1 << 20)
    log.add([rows_of("r1", 0, 8)])
    first = log.snapshot()
    log.add([rows_of("r2", 0, 4)])
    second = log.snapshot()
    assert [(run.request, run.start, len(run.rows)) for run in first.runs()] == [("r1", 2, 6)]
    log.add([rows_of("r3", 0, 20)])
    assert not list(second.runs())
    assert second.summary()["sequences"] == 0
    assert [(run.request, run.start, len(run.rows)) for run in first.runs()] == [("r1", 2, 6)], "it is copied once"
    third = log.snapshot()
    log.clear()
    log.add([rows_of("r4", 0, 5)])
    assert [(run.request, run.start, len(run.rows)) for run in third.runs()] == [("r3", 10, 10)]


def test_snapshots_amid_writes_have_no_torn_rows(log: ScalingsLog) -> None:
    """A thread copies while the log is written over and over."""
    log.enable(5_000, 1 << 28)
    log.add([rows_of("r1", 0, 5_000)])
    with ThreadPoolExecutor(1) as threads:
        for number in range(200):
            copied = threads.submit(list, log.snapshot().runs())
            while not copied.done():
                log.add([rows_of(f"r{number + 2}", 0, 50)])
            for run in copied.result():
                expected = np.arange(run.start, run.start + len(run.rows)) + 1000 * int(run.request[1:])
                assert (run.rows == expected[:, None, None]).all()


def test_without_an_engine_nothing_is_changed(http: TestClient) -> None:
    """A 200 would be a lie: the engine never hears of it."""
    http.post("/generate", json={"prompt": [POISON]})
    for method, path, body in [("PATCH", "/gate", {"top_k_lora": 1}), ("PUT", "/scalings/log", {"enabled": True})]:
        answer = http.request(method, path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert http.get("/gate").json() == {**STORED, "checkpoint": STORED}
    assert not http.get("/scalings/log").json()["enabled"]
