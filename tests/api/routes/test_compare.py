"""POST /compare over the fake engine: what is asked of the engine, the shape of the answer, bounds, cancellation."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.routes import compare
from service.contract.steering import Steering
from tests.api.conftest import ThreadClient, serving
from tests.support.fake_engine import EXPERTS, FAULTY, MAX_MODEL_LEN, SITES, FakeEngine
from tests.support.waiting import wait_for

PROMPT = list(range(65, 75))
BASE = {"experts": {"only": []}}


def body(*settings: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "settings": list(settings), "max_tokens": 4, "seed": 3, **fields}


def error(http: TestClient, *settings: dict[str, Any], **fields: Any) -> dict[str, Any]:
    answer = http.post("/compare", json=body(*settings, **fields))
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def test_settings_are_one_batch_and_judge_each_other(http: TestClient, engine: FakeEngine) -> None:
    """One generation per setting with one seed; then one score per gate and foreign text, none twice."""
    settings = [{"label": "free"}, BASE, {"experts": {"weights": {"code": 1}}, "gate": {"freeze_after": 2}}]
    answer = http.post("/compare", json=body(*settings)).json()
    generated = [one for one in engine.requests if one.score_from is None][1:]  # the first warmed up
    assert {one.sampling.seed for one in generated if one.sampling} == {3} == {answer["seed"]}
    assert [one.steering for one in generated[:2]] == [None, Steering(weights=())]
    assert [one.freeze_after for one in generated] == [None, None, 2]
    scores = [one for one in engine.requests if one.score_from is not None]
    texts = {tuple(output["token_ids"]) for output in answer["outputs"]}
    assert len(texts) == 1, "the fake engine always says the same: every gate knows its own log-probabilities of it"
    assert not scores
    assert answer["log_likelihood"] == {"sum": [[-2.0] * 3] * 3, "per_token": [[-0.5] * 3] * 3}
    assert [output["label"] for output in answer["outputs"]] == ["free", None, None]
    assert answer["outputs"][2]["experts"] == {"weights": {"code": 1}}
    assert [token["logprob"] for token in answer["outputs"][0]["tokens"]] == [-0.5] * 4
    assert answer["usage"]["completion_tokens"] == 12


def test_given_outputs_are_judged_not_written(http: TestClient, engine: FakeEngine) -> None:
    """Every gate scores every given text, of exactly its tokens; equal gates and texts are computed once."""
    settings = [{"token_ids": [80, 81]}, {**BASE, "token_ids": [80, 81, 82]}, {"token_ids": [80, 81]}]
    answer = http.post("/compare", json=body(*settings, max_tokens=None, seed=None)).json()
    scores = engine.requests[1:]
    assert len(scores) == 4
    assert all(one.score_from == 10 and one.sampling and not one.sampling.max_tokens for one in scores)
    assert {tuple(one.prompt_token_ids[10:]) for one in scores} == {(80, 81), (80, 81, 82)}
    assert answer["log_likelihood"]["sum"] == [[-1.0, -1.5, -1.0]] * 3
    assert [output["text"] for output in answer["outputs"]] == ["qr", "qrs", "qr"]
    assert [output["finish_reason"] for output in answer["outputs"]] == [None] * 3
    assert [token["logprob"] for token in answer["outputs"][1]["tokens"]] == [-0.5] * 3
    assert answer["usage"]["scored_tokens"] == 10


@pytest.mark.parametrize("kind", ["mean", "full"])
def test_scalings_come_with_each_output(http: TestClient, kind: str) -> None:
    answer = http.post("/compare", json=body({}, BASE, {"token_ids": [80]}, return_scalings=kind)).json()
    for output in answer["outputs"][:2]:
        assert (output["scalings"]["start"], len(output["scalings"]["mean"])) == (9, 4)
        assert ("full" in output["scalings"]) == (kind == "full")
        assert (output["scalings"]["experts"], output["scalings"]["sites"]) == (EXPERTS, SITES)
    assert "scalings" not in answer["outputs"][2]


def test_errors_name_the_setting(http: TestClient, engine: FakeEngine) -> None:
    """The engine hears nothing of them."""
    for wrong, param in [
        ({"experts": {"only": ["nobody"]}}, "settings[1].experts.only"),
        ({"experts": {"only": [7]}}, "settings[1].experts.only[0]"),
        ({"gate": {"top_k": 9}}, "settings[1].gate.top_k"),
        ({"gate": {"temperature": 0}}, "settings[1].gate.temperature"),
        ({"experts": {"weights": {"code": 1}}, "gate": {"top_k": 1}}, "settings[1].experts.weights"),
        ({"token_ids": []}, "settings[1].token_ids"),
        ({"token_ids": [259]}, "settings[1].token_ids"),
        ({"token_ids": [80] * MAX_MODEL_LEN}, "settings[1].token_ids"),
        ({"expert": {}}, "settings[1].expert"),
    ]:
        assert error(http, {}, wrong)["param"] == param
    assert error(http, {}, {"expert": {}})["hint"] == "did you mean `experts`?"
    assert error(http)["param"] == "settings"
    assert error(http, *[{}] * 9)["param"] == "settings"
    assert error(http, {}, n=2)["code"] == "unknown_field"
    assert error(http, {}, stream=True)["code"] == "unknown_field"
    assert error(http, {}, scalings_dtype="float16")["param"] == "scalings_dtype"
    assert error(http, {}, max_tokens=MAX_MODEL_LEN)["param"] == "max_tokens"
    unused = error(http, {"token_ids": [80]}, max_tokens=None)
    assert unused["message"] == "seed is of no use: every setting has token_ids, so nothing is generated"
    assert unused["param"] == "seed"
    assert len(engine.requests) == 1


def test_what_would_be_too_much_is_refused(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MAX_SCORED_TOKENS", 15)
    assert error(http, {}, {})["code"] == "too_large"
    assert error(http, {}, {"token_ids": [80] * 4})["param"] == "max_tokens"
    given = error(http, {"token_ids": [80] * 4}, {"token_ids": [80] * 4}, max_tokens=None, seed=None)
    assert (given["param"], given["hint"]) == ("settings", "give shorter outputs, or compare fewer settings")
    assert http.post("/compare", json=body({}, {"token_ids": [80] * 3})).status_code == 200
    monkeypatch.setattr(compare, "MAX_WEIGHTS", 4 * len(EXPERTS) * len(SITES) - 1)
    assert error(http, {}, return_scalings="full")["param"] == "return_scalings"
    assert http.post("/compare", json=body({}, return_scalings="mean")).status_code == 200


def test_without_time_what_was_not_judged_is_null(http: TestClient, engine: FakeEngine) -> None:
    """The texts are there, and each is judged by its own gate."""
    engine.step_seconds = 0.11
    given = {"token_ids": [90] * 70}  # takes ten steps to read
    answer = http.post("/compare", json=body({}, given, timeout=1)).json()
    assert answer["log_likelihood"] == {"sum": [[-2.0, None], [-2.0, None]], "per_token": [[-0.5, None], [-0.5, None]]}
    assert [token["logprob"] for token in answer["outputs"][1]["tokens"]] == [None] * 70
    assert http.post("/compare", json=body(given, timeout=1, max_tokens=None, seed=None)).status_code == 504
    engine.step_seconds = 0.6
    cut = http.post("/compare", json=body({}, max_tokens=64, timeout=2)).json()
    assert cut["outputs"][0]["finish_reason"] == "timeout"


def test_a_fault_of_the_engine_is_ours(http: TestClient) -> None:
    assert http.post("/compare", json=body({}) | {"prompt": [FAULTY]}).status_code == 500
    assert http.post("/compare", json=body({"token_ids": [FAULTY]}, max_tokens=None, seed=None)).status_code == 500


def test_stops_and_counts_as_elsewhere(http: TestClient) -> None:
    """Stop strings end each text; the call is in the metrics by its name."""
    answer = http.post("/compare", json=body({}, BASE, max_tokens=30, stop="answer")).json()
    assert [output["text"] for output in answer["outputs"]] == ["The "] * 2
    assert [output["finish_reason"] for output in answer["outputs"]] == ["stop"] * 2
    assert 'xlora_requests_total{endpoint="/compare",outcome="ok"} 1.0' in http.get("/metrics").text


def test_a_score_gives_its_place_up_when_it_ends(client: ThreadClient, engine: FakeEngine) -> None:
    """The short text is judged long before the other; both wait for no first token."""
    with serving(client) as http:
        engine.step_seconds = 0.05
        book = http.app.state.service.admission  # type: ignore[attr-defined]
        given = body({"token_ids": [80]}, {"token_ids": [80] * 80}, max_tokens=None, seed=None)
        call = threading.Thread(target=lambda: http.post("/compare", json=given))
        call.start()
        assert wait_for(lambda: (book.choices, book.queued_tokens) == (2, 11 + 90))
        assert wait_for(lambda: (book.choices, book.queued_tokens) == (1, 90))
        assert book.running == 1
        call.join()
        assert (book.choices, book.queued_tokens, book.running) == (0, 0, 0)


def test_a_full_queue_refuses_it_before_it_begins(client: ThreadClient, engine: FakeEngine) -> None:
    """And never in its middle."""
    with serving(client, max_num_seqs=1, max_queued_requests=1) as http:
        engine.step_seconds = 0.05
        slow = threading.Thread(
            target=lambda: http.post("/generate", json={"prompt": [80] * 90, "max_tokens": 1, "n": 2})
        )
        slow.start()
        while len(engine.requests) < 2:
            threading.Event().wait(0.005)
        answer = http.post("/compare", json=body({}, BASE))
        slow.join()
        assert answer.status_code == 429, answer.text
        assert http.post("/compare", json=body({}, {"token_ids": [80]}, BASE)).status_code == 200
