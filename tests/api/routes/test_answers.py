"""What is written is what is described: answers and events against the OpenAPI document, every object of it closed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import jsonschema_rs
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from typing_extensions import is_typeddict

from service.api.routes import admin, compare, generate, openai, ops, scalings
from tests.api.conftest import ThreadClient, serving
from tests.support.fake_engine import FAULTY, FakeEngine, fake_info, write_bundle

TEXT: dict[str, Any] = {"prompt": "Once", "max_tokens": 4}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 4}
STEERED: dict[str, Any] = {"experts": {"exclude": ["code"]}, "gate": {"temperature": 0.5}}
ROWS = {"return_scalings": "full", "scalings_start": 0}
GIVEN = {"label": "given", "token_ids": [8, 9]}

GENERATED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", TEXT),
    ("/generate", TEXT | {"n": 2, "logprobs": 2} | STEERED | ROWS),
    ("/v1/completions", TEXT),
    ("/v1/completions", TEXT | {"n": 2, "logprobs": 2, "echo": True, "xlora": STEERED | ROWS}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2, "xlora": STEERED | ROWS}),
]
POSTED: list[tuple[str, dict[str, Any]]] = [
    *GENERATED,
    ("/compare", TEXT | {"settings": [{}, STEERED, GIVEN], "return_scalings": "full"}),
    ("/scalings", {"prompt": "Once", "return_scalings": "full"}),
    ("/scalings", {"prompt": "Once", "perplexity": True}),
    ("/scalings", {"prompt": ["Once", "upon"], "granularity": "layer"}),
    ("/tokenize", {"text": "Once"}),
    ("/tokenize", {"messages": [{"role": "user", "content": "Once"}]}),
    ("/detokenize", {"token_ids": [8, 9]}),
]
MODULES = (admin, compare, generate, openai, ops, scalings)
GOT = ("/livez", "/readyz", "/health", "/info", "/gate", "/scalings/log", "/v1/models", "/v1/models/fake")


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One for all: none of the calls changes anything."""
    with serving(ThreadClient(FakeEngine(fake_info(write_bundle(tmp_path_factory.mktemp("fake")))))) as http:
        yield http


@pytest.fixture(scope="module")
def described(http: TestClient) -> dict[str, Any]:
    """The OpenAPI document; an object may have only what it says."""
    found: dict[str, Any] = http.get("/openapi.json").json()
    for schema in found["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return found


def check(value: object, schema: dict[str, Any], components: dict[str, Any]) -> None:
    jsonschema_rs.validate(schema | {"components": components}, value)


def content(described: dict[str, Any], path: str, method: str, status: int = 200) -> dict[str, Any]:
    path = "/v1/models/{name}" if path.startswith("/v1/models/") else path
    found: dict[str, Any] = described["paths"][path][method]["responses"][str(status)]["content"]
    return found


def event_schema(stream: dict[str, Any]) -> dict[str, Any]:
    """Of all events but [DONE]."""
    written, done = stream["schema"]["properties"]["data"]["anyOf"]
    assert done == {"const": "[DONE]"}
    found: dict[str, Any] = written["contentSchema"]
    return found


def events_of(text: str) -> Iterator[object]:
    for line in text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize(("path", "body"), POSTED)
def test_answers(http: TestClient, described: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    check(answer.json(), content(described, path, "post")["application/json"]["schema"], described["components"])


@pytest.mark.parametrize(("path", "body"), GENERATED)
def test_events(http: TestClient, described: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    """Also the last one, which has the usage."""
    last = {} if path == "/generate" else {"stream_options": {"include_usage": True}}
    schema = content(described, path, "post")["text/event-stream"]["schema"]["properties"]["data"]["anyOf"][0][
        "contentSchema"
    ]
    found = list(events_of(http.post(path, json=body | last | {"stream": True}).text))
    assert len(found) > 4
    for one in found:
        check(one, schema, described["components"])


@pytest.mark.parametrize("path", GOT)
def test_states(http: TestClient, described: dict[str, Any], path: str) -> None:
    check(http.get(path).json(), content(described, path, "get")["application/json"]["schema"], described["components"])


@pytest.mark.parametrize(("body", "status"), [({"prompt": ""}, 400), ({"promt": ""}, 400), ({"prompt": [FAULTY]}, 500)])
def test_errors(http: TestClient, described: dict[str, Any], body: dict[str, Any], status: int) -> None:
    answer = http.post("/generate", json=body)
    schema = content(described, "/generate", "post", status)["application/json"]["schema"]
    check(answer.json(), schema, described["components"])


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_examples_of_streams(described: dict[str, Any], path: str) -> None:
    """Those of whole answers are checked by mypy; the document leaves out their nulls."""
    stream = content(described, path, "post")["text/event-stream"]
    found = list(events_of(stream["example"]))
    assert found
    for one in found:
        check(one, event_schema(stream), described["components"])
    assert stream["example"].endswith("data: [DONE]\n\n")


def test_the_check_sees_a_field_that_is_not_described(http: TestClient, described: dict[str, Any]) -> None:
    """Negative control."""
    answer = http.post("/generate", json=TEXT).json()
    answer["usage"]["joules"] = 3
    schema = content(described, "/generate", "post")["application/json"]["schema"]
    with pytest.raises(jsonschema_rs.ValidationError, match="joules"):
        check(answer, schema, described["components"])


def test_answers_are_typed_dictionaries() -> None:
    """A model of pydantic would be a second description of what a writer makes."""
    routes = [route for module in MODULES for route in module.router.routes if isinstance(route, APIRoute)]
    kinds = [route.response_model for route in routes if route.response_model is not None]
    assert len(kinds) > 12
    for kind in kinds:
        assert all(map(is_typeddict, get_args(kind) or (kind,))), kind
