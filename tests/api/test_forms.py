"""response_format: what the engine is asked for, and what is refused before it hears of the request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.fields import ResponseFormat
from service.api.forms import KEYWORDS, MAX_SCHEMA_BYTES, TextForms, text_form
from service.api.regex_size import regex_size
from service.engine.request import TextForm
from service.errors import InvalidRequestError, UnavailableError
from tests.api.conftest import ThreadClient, serving
from tests.api.test_connections import wait_for
from tests.api.test_errors import error_of
from tests.fake_engine import FakeEngine, fake_info, write_bundle

BODIES = {
    "/generate": {"prompt": [40, 41], "max_tokens": 3},
    "/v1/completions": {"prompt": [40, 41], "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> ThreadClient:
    return ThreadClient(FakeEngine(fake_info(write_bundle(tmp_path_factory.mktemp("fake")))))


@pytest.fixture(scope="module")
def http(client: ThreadClient) -> Iterator[TestClient]:
    """One application for all tests: it has a process that takes a while to start."""
    with serving(client) as http:
        yield http


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def post(http: TestClient, wanted: Any, path: str = "/generate", **more: Any) -> Any:
    return http.post(path, json=BODIES[path] | {"response_format": wanted} | more)


def refused(http: TestClient, wanted: Any, **more: Any) -> dict[str, Any]:
    response = post(http, wanted, **more)
    assert response.status_code == 400, response.text
    return error_of(response)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("wanted", "form"),
    [
        ({"type": "text"}, None),
        (None, None),
        ({"type": "json_object"}, TextForm(json_schema='{"type":"object"}')),
        ({"type": "regex", "pattern": "a+"}, TextForm(regex="a+")),
        (json_schema({"const": "é"}), TextForm(json_schema='{"const":"é"}')),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "description": "b", "schema": SCHEMA, "strict": True}},
            TextForm(json_schema=json.dumps(SCHEMA, separators=(",", ":"))),
        ),
    ],
)
def test_every_route_takes_it(
    http: TestClient, client: ThreadClient, path: str, wanted: Any, form: TextForm | None
) -> None:
    assert post(http, wanted, path).status_code == 200
    sampling = client.engine.requests[-1].sampling
    assert sampling is not None
    assert sampling.form == form


@pytest.mark.parametrize(
    ("wanted", "param", "words"),
    [
        ({"type": "xml"}, "response_format.type", "json_object"),
        ({"type": "json_schema"}, "response_format", "json_schema"),
        ({"type": "regex"}, "response_format", "pattern"),
        ({"type": "text", "pattern": "a"}, "response_format", "pattern"),
        ({"type": "json_object", "schema": {}}, "response_format.schema", "json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name", "missing"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema", "missing"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "response_format.json_schema.name", ""),
        ({"type": "regex", "pattern": "(a"}, "response_format", "unclosed group"),
        ({"type": "regex", "pattern": "(?=a)"}, "response_format", "look-around"),
        ({"type": "regex", "pattern": "\ud800"}, "response_format.pattern", ""),
        ({"type": "regex", "pattern": "a" * 5000}, "response_format.pattern", "4096"),
        ({"type": "regex", "pattern": "(a{1000}){1000}"}, "response_format.pattern", "10000"),
        ({"type": "regex", "pattern": "{" + 400 * "9" + "}(a{1000}){1000}"}, "response_format.pattern", "10000"),
        (json_schema({"type": "nothing"}), "response_format", "nothing"),
        (json_schema({"$ref": "#"}), "response_format", "no text"),
        (json_schema({"$ref": "https://example.org/a"}), "response_format", "https://example.org/a"),
        (json_schema({"type": "string", "format": "soup"}), "response_format", "soup"),
        (json_schema({"not": {}}), "response_format.json_schema.schema.not", "does not enforce"),
        (
            json_schema({"properties": {"a": {"maxLenght": 3}}}),
            "response_format.json_schema.schema.properties.a.maxLenght",
            "did you mean `maxLength`?",
        ),
        (json_schema({"anyOf": {"type": "string"}}), "response_format.json_schema.schema.anyOf", "list of schemas"),
        (json_schema({"properties": [1]}), "response_format.json_schema.schema.properties", "object of schemas"),
        (json_schema({"properties": None}), "response_format.json_schema.schema.properties", "object of schemas"),
        (
            json_schema({"items": {"patternProperties": 5}}),
            "response_format.json_schema.schema.items.patternProperties",
            "object of schemas",
        ),
        (json_schema({"items": 3}), "response_format.json_schema.schema.items", "not a schema"),
        (json_schema({"multipleOf": 1000003}), "response_format.json_schema.schema.multipleOf", "1000"),
        (json_schema({"multipleOf": 0.1}), "response_format.json_schema.schema.multipleOf", "integer"),
        (
            json_schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}),
            "response_format.json_schema.schema",
            "product",
        ),
        (
            json_schema({"pattern": "((a{9}){99}){99}"}),
            "response_format.json_schema.schema.pattern",
            "repetitions written out",
        ),
        (
            json_schema({"patternProperties": {"(a{200}){200}": {}}}),
            "response_format.json_schema.schema.pattern",
            "repetitions written out",
        ),
        (
            json_schema({"properties": {f"p{i}": {} for i in range(401)}}),
            "response_format.json_schema.schema",
            "401 properties",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    http: TestClient, client: ThreadClient, wanted: Any, param: str, words: str
) -> None:
    """By name, with what to do; and the engine hears nothing of it."""
    before = len(client.engine.requests)
    response = http.post(
        "/generate",
        content=json.dumps(BODIES["/generate"] | {"response_format": wanted}),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert words in error["message"] + error.get("hint", "")
    assert len(client.engine.requests) == before


def test_a_long_schema_is_refused() -> None:
    wanted = ResponseFormat.model_validate(json_schema({"enum": ["é" * (MAX_SCHEMA_BYTES // 2)]}))
    with pytest.raises(InvalidRequestError, match="65549 bytes; at most 65536"):
        text_form(wanted)


@pytest.mark.parametrize("depth", [33, 900])
def test_a_deep_schema_is_refused(http: TestClient, depth: int) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    assert "32 deep" in refused(http, json_schema(schema))["message"]


def test_numbers_that_are_not_of_json(http: TestClient) -> None:
    body = '{"prompt": [40], "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": %s}}}'
    for schema in ('{"minimum": NaN}', '{"maximum": 1e999}'):
        response = http.post("/generate", content=body % schema, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text


def test_a_form_says_where_the_text_ends(http: TestClient) -> None:
    error = refused(http, {"type": "json_object"}, ignore_eos=True)
    assert error["param"] == "ignore_eos"
    assert post(http, {"type": "text"}, ignore_eos=True).status_code == 200


def test_a_form_is_judged_once(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good or bad."""
    assert post(http, {"type": "regex", "pattern": "ab"}).status_code == 200
    first = refused(http, {"type": "regex", "pattern": "(ab"})
    forms: TextForms = http.app.state.service.forms  # type: ignore[attr-defined]
    monkeypatch.setattr(forms._trial, "judge", None)
    assert post(http, {"type": "regex", "pattern": "ab"}).status_code == 200
    assert refused(http, {"type": "regex", "pattern": "(ab"}) == first


def test_what_takes_too_long_to_compile_is_given_up(http: TestClient) -> None:
    """Its process is killed; the next form has a new one. This one takes 20 s where it may."""
    assert post(http, {"type": "json_object"}).status_code == 200
    forms: TextForms = http.app.state.service.forms  # type: ignore[attr-defined]
    forms._trial._seconds = 0.5
    bomb = json_schema({"allOf": [{"type": "string", "pattern": f"x{i}.*y{i}"} for i in range(20)]})
    assert "over 0.5 seconds" in refused(http, bomb)["message"]
    forms._trial._seconds = 60.0
    assert post(http, {"type": "regex", "pattern": "ok"}).status_code == 200


def test_a_trial_that_dies_refuses_its_form_alone(http: TestClient) -> None:
    assert post(http, {"type": "json_object"}).status_code == 200
    forms: TextForms = http.app.state.service.forms  # type: ignore[attr-defined]
    assert forms._trial._process is not None
    os.kill(forms._trial._process.pid, signal.SIGKILL)
    assert "too much memory" in refused(http, {"type": "regex", "pattern": "one"})["message"]
    assert post(http, {"type": "regex", "pattern": "two"}).status_code == 200


def test_a_trial_that_does_not_start_is_our_fault(http: TestClient) -> None:
    forms: TextForms = http.app.state.service.forms  # type: ignore[attr-defined]
    forms._trial._end()
    command, forms._trial._command = forms._trial._command, ["false"]
    response = post(http, {"type": "regex", "pattern": "three"})
    assert "did not start" in error_of(response, 503)["message"]
    forms._trial._command = command
    assert post(http, {"type": "regex", "pattern": "three"}).status_code == 200


def test_many_new_forms_at_once_are_too_many(http: TestClient) -> None:
    forms: TextForms = http.app.state.service.forms  # type: ignore[attr-defined]
    forms._waiting = 16
    response = post(http, {"type": "regex", "pattern": "x"})
    assert response.status_code == 429
    assert "Retry-After" in response.headers
    forms._waiting = 0
    assert post(http, {"type": "regex", "pattern": "x"}).status_code == 200


KNOWN = {
    "items": {}, "additionalItems": False, "additionalProperties": False, "prefixItems": [{}], "anyOf": [{}],
    "oneOf": [{"type": "string"}], "allOf": [{}], "properties": {"a": {}}, "patternProperties": {"^a": {}},
    "$defs": {"a": {}}, "definitions": {"a": {}}, "type": "string", "enum": ["a"], "const": "a", "$ref": "#/$defs/a",
    "minLength": 1, "maxLength": 2, "pattern": "a", "format": "date", "minimum": 0, "maximum": 1,
    "exclusiveMinimum": 0, "exclusiveMaximum": 2, "multipleOf": 2, "minItems": 1, "maxItems": 2, "minProperties": 0,
    "maxProperties": 2, "required": ["a"], "title": "a", "description": "a", "default": 1, "examples": [1],
    "$comment": "a", "$schema": "http://json-schema.org/draft-07/schema#", "deprecated": True, "readOnly": True,
    "writeOnly": True, "discriminator": {"propertyName": "a"},
}  # fmt: skip


@pytest.mark.parametrize("keyword", sorted(KEYWORDS))
def test_every_keyword_that_is_let_through_is_known(http: TestClient, keyword: str) -> None:
    """The library takes it, so that what is documented can be used."""
    schema = {"$defs": {"a": {"type": "string"}}} | {keyword: KNOWN[keyword]}
    response = post(http, json_schema(schema))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0), ("abc", 3), ("a|b", 2), ("(ab{3}){2}", 8), ("a{3}{4}", 12), (r"\d{4}-\d{2}", 7), ("[a-z]{3,5}", 5),
        (r"[\]]{3}", 3), ("[]a]{2}", 2), ("(?:ab){2}", 4), ("(?P<n>ab){2}", 4), ("(?i:ab){3}", 6), (r"\p{L}{10}", 10),
        (r"\{3}", 3), ("[[:alpha:]]{3}", 3), ("(a{10}[[a])]){10}", 110), ("{3}", 0), ("a{", 2), ("((((", 0),
        ("[[[a]](]", float("inf")), ("[", float("inf")), ("a{,5}", 5), ("a{5,}", 5),
    ],
)  # fmt: skip
def test_regex_size(pattern: str, size: float) -> None:
    assert regex_size(pattern) == size


def test_who_waits_for_a_verdict_when_the_server_stops_hears_so(client: ThreadClient) -> None:
    """The form is not to blame and nothing was begun: 503 for the one being judged, the one behind it, the next."""
    fresh = ThreadClient(FakeEngine(client.engine.info))
    with serving(fresh) as http, ThreadPoolExecutor(2) as threads:
        assert post(http, {"type": "json_object"}).status_code == 200
        forms: TextForms = http.app.state.service.forms  # type: ignore[attr-defined]
        forms._trial._seconds = 60.0
        assert forms._trial._process is not None
        forms._trial._process.send_signal(signal.SIGSTOP)  # the longest of verdicts
        waiting = [threads.submit(post, http, {"type": "regex", "pattern": one}) for one in ("judged", "behind")]
        assert wait_for(lambda: forms._waiting == 2)
        http.portal.call(forms.close)  # type: ignore[union-attr]
        for response in [*(one.result() for one in waiting), post(http, {"type": "regex", "pattern": "late"})]:
            assert error_of(response, 503)["code"] == "stopping"
            assert "retry-after" in response.headers
        assert forms._trial._process is None
        assert post(http, {"type": "json_object"}).status_code == 200  # judged before


def test_a_trial_that_is_started_while_the_server_stops_is_ended(
    client: ThreadClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() finds no process yet: who starts it ends it."""
    forms = TextForms(client.engine.info)
    start = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def stop_meanwhile(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        forms.close()
        started.append(start(*arguments, **more))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", stop_meanwhile)
    with pytest.raises(UnavailableError):
        forms._trial.judge(TextForm(regex="a"))
    assert started[0].poll() is not None
