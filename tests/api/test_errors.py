"""Bad input of every kind gets a 4xx in one shape, and the server goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import ThreadClient, serving
from tests.support.fake_engine import POISON, UNTAKEN, FakeEngine, fake_info, write_bundle

JSON = {"Content-Type": "application/json"}


def error_of(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) - {"hint"} == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return error


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One for all bodies: none of them may change anything."""
    with serving(ThreadClient(FakeEngine(fake_info(write_bundle(tmp_path_factory.mktemp("fake")))))) as http:
        yield http


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"prompt": ', None),
        ("", None),
        ("[]", None),
        ("null", None),
        ("{}", "prompt"),
        ('{"prompt": ""}', "prompt"),
        ('{"prompt": []}', "prompt"),
        ('{"prompt": 5}', "prompt"),
        ('{"prompt": null}', "prompt"),
        ('{"prompt": [true]}', "prompt"),
        ('{"prompt": [1.5]}', "prompt"),
        ('{"prompt": [999]}', "prompt"),
        ('{"prompt": [-1]}', "prompt"),
        ('{"prompt": [' + "9" * 400 + "]}", "prompt"),
        ('{"prompt": "\\ud800"}', None),
        ('{"prompt": "a", "\\ud800": 1}', None),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": "5"}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": 96}', "max_tokens"),
        ('{"prompt": "a", "temperature": NaN}', "temperature"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature"),
        ('{"prompt": "a", "temperature": -Infinity}', "temperature"),
        ('{"prompt": "a", "temperature": ' + "9" * 400 + "}", "temperature"),
        ('{"prompt": "a", "temperature": 2.5}', "temperature"),
        ('{"prompt": "a", "top_p": 0}', "top_p"),
        ('{"prompt": "a", "top_k": ' + "9" * 400 + "}", "top_k"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", None),
        ('{"prompt": "a", "seed": 9223372036854775808}', "seed"),
        ('{"prompt": "a", "n": 17}', "n"),
        ('{"prompt": "a", "logprobs": 21}', "logprobs"),
        ('{"prompt": "a", "logprobs": true}', "logprobs"),
        ('{"prompt": "a", "logit_bias": {"999": 1}}', "logit_bias"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        ('{"prompt": "a", "logit_bias": {"1": NaN}}', "logit_bias"),
        ('{"prompt": "a", "logit_bias": {"' + "9" * 5000 + '": 1}}', "logit_bias"),
        ('{"prompt": "a", "stop": [null]}', "stop"),
        ('{"prompt": "a", "stop": "' + "x" * 1025 + '"}', "stop"),
        ('{"prompt": "a", "stop": [' + ",".join(f'"{number}"' for number in range(65)) + "]}", "stop"),
        ('{"prompt": "a", "stop_token_ids": [259]}', "stop_token_ids"),
        ('{"prompt": "a", "stream": 1}', "stream"),
        ('{"prompt": "a", "return_scalings": "some"}', "return_scalings"),
        ('{"prompt": "a", "return_scalings": "mean", "scalings_start": 1}', "scalings_start"),
        ('{"prompt": "a", "scalings_start": 0}', "scalings_start"),
        ('{"prompt": "a", "return_scalings": "mean", "scalings_dtype": "float16"}', "scalings_dtype"),
        ('{"prompt": "a", "experts": {"only": "math"}}', "experts.only"),
        ('{"prompt": "a", "experts": {"only": ["maths"]}}', "experts.only"),
        ('{"prompt": "a", "experts": {"exclude": [0]}}', "experts.exclude[0]"),
        ('{"prompt": "a", "experts": {"weights": {"x": 1}}}', "experts.weights"),
        ('{"prompt": "a", "experts": {"weights": {"math": true}}}', "experts.weights.math"),
        ('{"prompt": "a", "experts": {"weights": {"math": []}}}', "experts.weights.math"),
        ('{"prompt": "a", "experts": {"weights": {"math": 100.1}}}', "experts.weights.math[0].weight"),
        ('{"prompt": "a", "experts": {"weights": {"math": [{"layers": [0, 1]}]}}}', "experts.weights.math[0].weight"),
        ('{"prompt": "a", "experts": {"weights": {"math": [{"weight": 1, "layers": [1, 2]}]}}}', "experts.weights"),
        ('{"prompt": "a", "experts": {"weights": {"math": [{"weight": 1, "layers": [1, 0]}]}}}', "experts.weights"),
        ('{"prompt": "a", "experts": {"weights": {"math": 1}, "only": ["math"]}}', "experts.weights"),
        ('{"prompt": "a", "experts": {"weights": {"math": 1}}, "gate": {"top_k": 1}}', "experts.weights"),
        ('{"prompt": "a", "experts": {"weights": {"math": [' + ",".join(['{"weight":1}'] * 1025) + "]}}}", "experts"),
        ('{"prompt": "a", "gate": {"temperature": 0.009}}', "gate.temperature"),
        ('{"prompt": "a", "gate": {"temperature": 101}}', "gate.temperature"),
        ('{"prompt": "a", "gate": {"top_k": 0}}', "gate.top_k"),
        ('{"prompt": "a", "gate": {"top_k": 4}}', "gate.top_k"),
        ('{"prompt": "a", "gate": {"freeze_after": 0}}', "gate.freeze_after"),
        ('{"prompt": "a", "cache_salt": 5}', "cache_salt"),
        ('{"prompt": "a", "timeout": 0}', "timeout"),
        ('{"prompt": "a", "timeout": 601}', "timeout"),
        ('{"prompt": "a", "inputs_embeds": []}', "inputs_embeds"),
        ("[" * 20_000, None),
        ('{"prompt": ' + "[" * 20_000, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_bodies(lasting: TestClient, body: str, param: str | None, stream: bool) -> None:
    if stream and body.startswith('{"prompt": "a"'):
        body = body[:-1] + ', "stream": true}' if '"stream"' not in body else body
    error = error_of(lasting.post("/generate", content=body, headers=JSON))
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert lasting.post("/generate", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_prompt_over_the_context_names_the_numbers(http: TestClient) -> None:
    assert "96" in error_of(http.post("/generate", json={"prompt": [1] * 97}))["message"]
    assert error_of(http.post("/scalings", json={"prompt": [1] * 97}))["code"] == "context_length_exceeded"
    assert error_of(http.post("/generate", json={"prompt": [1] * 96}))["param"] == "prompt"
    error = error_of(http.post("/generate", json={"prompt": [1] * 90, "max_tokens": 7}))
    assert "97" in error["message"]
    assert "6" in error["hint"]


def test_an_unknown_field_gets_a_suggestion_before_anything_else(http: TestClient) -> None:
    error = error_of(http.post("/generate", json={"prompt": 5, "max_token": 5}))
    assert (error["param"], error["code"], error["hint"]) == (
        "max_token",
        "unknown_field",
        "did you mean `max_tokens`?",
    )


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_cannot_take_is_a_500(http: TestClient, stream: bool) -> None:
    error = error_of(http.post("/generate", json={"prompt": [UNTAKEN], "stream": stream}), 500)
    assert error["message"] == "the engine could not take this request (KeyError)"
    assert http.post("/generate", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_the_content_type_is_explained(http: TestClient) -> None:
    error = error_of(http.post("/generate", content='{"prompt": "a"}', headers={"Content-Type": "text/plain"}))
    assert "application/json" in error["hint"]


def test_unknown_paths_and_methods(http: TestClient) -> None:
    assert error_of(http.get("/v2/models"), 404)["code"] == "not_found"
    assert error_of(http.get("/generate"), 405)["hint"] == "use POST"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit(http: TestClient, chunked: bool) -> None:
    body = b'{"prompt": "' + b"a" * 70_000
    response = http.post("/generate", content=iter([body]) if chunked else body, headers=JSON)
    assert error_of(response, 413)["code"] == "payload_too_large"


def test_a_surprise_is_a_500_without_its_story(http: TestClient, client: ThreadClient) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("secret")

    client.submit = explode  # type: ignore[method-assign, assignment]
    response = http.post("/generate", json={"prompt": "a"})
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text


def test_a_dead_engine_is_503_and_red(http: TestClient) -> None:
    """500 for who was in it: a proxy sends a 503 to another server, and no prompt may kill one engine after another."""
    assert error_of(http.post("/generate", json={"prompt": [POISON]}), 500)["code"] == "engine_dead"
    response = http.post("/generate", json={"prompt": "a"})
    assert error_of(response, 503)["code"] == "engine_dead"
    assert response.headers["retry-after"] == "5"
    assert (http.get("/livez").status_code, http.get("/readyz").status_code) == (503, 503)
    assert http.get("/health").json()["status"] == "engine dead"


@pytest.mark.parametrize(
    ("path", "allowed"), [("/gate", "DELETE, GET, PATCH"), ("/scalings/log", "DELETE, GET, PUT"), ("/generate", "POST")]
)
def test_a_wrong_method_is_told_all_right_ones(http: TestClient, path: str, allowed: str) -> None:
    answer = http.request("OPTIONS", path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["error"]["hint"] == f"use {allowed}"
