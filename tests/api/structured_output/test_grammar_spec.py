"""response_format: what the engine is asked for, and what is refused before it hears of the request."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.processes.bounded_process import BoundedProcess
from service.api.schemas.fields import ResponseFormat
from service.api.structured_output.grammar_spec import MAX_SCHEMA_BYTES, GrammarSpecs, question_of
from service.api.structured_output.lark import schema_grammar
from service.api.structured_output.regex_size import regex_size
from service.api.structured_output.schema import Document
from service.api.structured_output.validation_process import Validation
from service.contract.errors import InvalidRequestError
from service.contract.request import FormLimits, GrammarSpec
from service.grammar import GrammarCompiler
from tests.api.conftest import ThreadClient, serving
from tests.api.processes.test_bounded_process import descriptors
from tests.api.test_errors import error_of
from tests.support.fake_engine import FakeEngine, fake_info, write_bundle
from tests.support.waiting import wait_for

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


def grammar_of(schema: dict[str, Any], limits: FormLimits | None = None) -> GrammarSpec:
    """The form of a schema that has no patterns, for which no vocabulary is asked."""
    return GrammarSpec(
        grammar=schema_grammar(Document("schema", schema), limits or FormLimits(), GrammarCompiler("", 0, []))
    )


def form_of(schema: Any) -> Any:
    """What is found wrong with a schema before its form has a process."""
    return question_of(ResponseFormat.model_validate(json_schema(schema)), FormLimits())


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
        ({"type": "json_object"}, grammar_of({"type": "object"})),
        ({"type": "regex", "pattern": "a+"}, GrammarSpec(regex="a+")),
        ({"type": "regex", "pattern": "a\\\\"}, GrammarSpec(regex="a\\\\")),
        ({"type": "regex", "pattern": ""}, GrammarSpec(regex="")),
        ({"type": "text", "pattern": ""}, None),
        (json_schema({"const": "é"}), grammar_of({"const": "é"})),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "description": "b", "schema": SCHEMA, "strict": True}},
            grammar_of(SCHEMA),
        ),
    ],
)
def test_every_route_takes_it(
    http: TestClient, client: ThreadClient, path: str, wanted: Any, form: GrammarSpec | None
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
        ({"type": "regex", "pattern": "(a"}, "response_format.pattern", "unclosed group"),
        ({"type": "regex", "pattern": "(?=a)"}, "response_format.pattern", "look-around"),
        *(
            ({"type": "regex", "pattern": pattern}, "response_format.pattern", "ends with a backslash")
            for pattern in ("\\", "a\\", "a\\\\\\")
        ),
        ({"type": "regex", "pattern": "\ud800"}, None, "hex escape"),
        ({"type": "regex", "pattern": "a" * 5000}, "response_format.pattern", "4096"),
        ({"type": "regex", "pattern": "(a{1000}){1000}"}, "response_format.pattern", "10000"),
        ({"type": "regex", "pattern": "{" + 400 * "9" + "}(a{1000}){1000}"}, "response_format.pattern", "10000"),
        (json_schema({"type": "nothing"}), "response_format.json_schema.schema.type", "nothing"),
        (json_schema({"$ref": "#"}), "response_format.json_schema.schema", "refers to itself"),
        (
            json_schema({"items": {"$ref": "https://example.org/a"}}),
            "response_format.json_schema.schema.items.$ref",
            "https://example.org/a",
        ),
        (
            json_schema({"required": ["a"], "type": "object", "properties": {"a": {"enum": [1], "type": "string"}}}),
            "response_format.json_schema.schema.properties.a",
            "no value",
        ),
        (
            json_schema({"items": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}),
            "response_format.json_schema.schema.items.oneOf.1",
            "use anyOf",
        ),
        (
            json_schema({"type": "object", "minProperties": 2}),
            "response_format.json_schema.schema.minProperties",
            "known to be different",
        ),
        (
            json_schema({"items": {"type": "array", "uniqueItems": True}}),
            "response_format.json_schema.schema.items.uniqueItems",
            "leave it out",
        ),
        (json_schema({"pattern": "(?=a)"}), "response_format.json_schema.schema.pattern", "look-around"),
        (
            json_schema({"properties": {"a": {"patternProperties": {letter: {} for letter in "abcdefg"}}}}),
            "response_format.json_schema.schema.properties.a.patternProperties",
            "too many patterns",
        ),
        (json_schema({"not": {}}), "response_format.json_schema.schema.not", "does not enforce"),
        (
            json_schema({"properties": {"a": {"maxLenght": 3}}}),
            "response_format.json_schema.schema.properties.a.maxLenght",
            "did you mean `maxLength`?",
        ),
        (json_schema({"anyOf": {"type": "string"}}), "response_format.json_schema.schema.anyOf", "list of schemas"),
        (json_schema({"properties": [1]}), "response_format.json_schema.schema.properties", "object of schemas"),
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
            "response_format.json_schema.schema.allOf.0.multipleOf",
            "988027 together",
        ),
        (
            json_schema({"pattern": "((a{9}){99}){99}"}),
            "response_format.json_schema.schema.pattern",
            "repetitions written out",
        ),
        (
            json_schema({"patternProperties": {"(a{200}){200}": {}}}),
            "response_format.json_schema.schema.patternProperties.(a{200}){200}",
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
    http: TestClient, client: ThreadClient, wanted: Any, param: str | None, words: str
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
    assert "llguidance" not in error["message"]
    if param is not None and param.startswith(("response_format.pattern", "response_format.json_schema.schema.")):
        assert error["code"] == "invalid_response_format"
    assert len(client.engine.requests) == before


def test_a_long_schema_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="65549 bytes; at most 65536"):
        form_of({"enum": ["é" * (MAX_SCHEMA_BYTES // 2)]})


@pytest.mark.parametrize("depth", [33, 190])
def test_a_deep_schema_is_refused(http: TestClient, depth: int) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    assert "32 deep" in refused(http, json_schema(schema))["message"]


NO_NUMBERS = {
    "401 digits": 10**400, "minus 401 digits": -(10**400), "5,000 digits": 10**5000, "41 digits": 10**40,
    "inf": math.inf, "-inf": -math.inf, "nan": math.nan,
}  # fmt: skip


@pytest.mark.parametrize("keyword", ["minimum", "multipleOf", "maxLength", "enum", "const", "default", "title"])
@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_number_that_no_grammar_can_hold(keyword: str, name: str) -> None:
    """Wherever one is, the path to it is named, before the process that compiles sees it."""
    schema = {"items": {"properties": {"a": {keyword: [NO_NUMBERS[name]]}}}}
    with pytest.raises(InvalidRequestError) as caught:
        form_of(schema)
    assert caught.value.param == f"response_format.json_schema.schema.items.properties.a.{keyword}.0"
    assert "integer" in caught.value.message or "number" in caught.value.message
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("where", ["name", "value"])
def test_half_of_a_surrogate_pair_in_a_schema(where: str) -> None:
    schema = {"a": {"\ud800": 1} if where == "name" else "\udfff"}
    with pytest.raises(InvalidRequestError, match=r"schema\.default\.a` has half of a surrogate pair"):
        form_of({"default": schema})


@pytest.mark.parametrize("keyword", ["minimum", "const", "maxLength", "default", "multipleOf"])
@pytest.mark.parametrize("value", ["9" * 401, "1e999", "NaN"])
def test_a_huge_number_is_a_400_of_its_own(http: TestClient, keyword: str, value: str) -> None:
    body = '{"prompt": [40], "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": %s}}}'
    content = body % f'{{"{keyword}": {value}}}'
    error = error_of(http.post("/generate", content=content, headers={"Content-Type": "application/json"}))
    assert "process" not in error["message"]


@pytest.mark.parametrize(
    "schema",
    [
        *({"type": kind, keyword: value}
          for kind, keyword in (
              ("integer", "minimum"), ("number", "maximum"), ("integer", "multipleOf"), ("string", "minLength"),
              ("string", "maxLength"), ("array", "minItems"), ("array", "maxItems"), ("object", "minProperties"),
          )
          for value in ("1", [], {})),
        *({keyword: -1.5} for keyword in ("multipleOf", "minLength", "maxItems", "maxProperties")),
        *({keyword: True} for keyword in ("minimum", "multipleOf", "minLength", "maxItems", "maxProperties")),
        {"type": ["integer", 3]}, {"enum": []}, {"enum": 3}, {"required": "a"}, {"required": [1]},
        {"format": 3}, {"pattern": 3}, {"$ref": 3}, {"$ref": "#/nowhere"},
        {"minLength": 2**63}, {"pattern": "a{4294967296}"}, {"pattern": "(" * 4000},
        {"patternProperties": {"(": {}}}, {"patternProperties": {"a{9999999999}": {}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_without_harm(http: TestClient, schema: dict[str, Any]) -> None:
    """One process answers them all: none of them ends it."""
    assert post(http, {"type": "json_object"}).status_code == 200
    before = process_of(http)._child
    error = refused(http, json_schema(schema))
    assert "its process" not in error["message"]
    assert process_of(http)._child is before


def test_a_form_says_where_the_text_ends(http: TestClient) -> None:
    error = refused(http, {"type": "json_object"}, ignore_eos=True)
    assert error["param"] == "ignore_eos"
    assert post(http, {"type": "text"}, ignore_eos=True).status_code == 200


def process_of(http: TestClient) -> BoundedProcess[Validation]:
    forms: GrammarSpecs = http.app.state.service.forms  # type: ignore[attr-defined]
    return forms._process


@contextmanager
def patient(http: TestClient, seconds: float) -> Iterator[None]:
    """With another bound on the time to compile."""
    process = process_of(http)
    bounds = process.bounds
    process.bounds = replace(bounds, answer_seconds=seconds)
    yield
    process.bounds = bounds


def test_a_form_is_judged_once(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good or bad."""
    assert post(http, {"type": "regex", "pattern": "ab"}).status_code == 200
    first = refused(http, {"type": "regex", "pattern": "(ab"})
    monkeypatch.setattr(process_of(http), "ask", None)
    assert post(http, {"type": "regex", "pattern": "ab"}).status_code == 200
    assert refused(http, {"type": "regex", "pattern": "(ab"}) == first


def test_what_takes_too_long_to_compile_is_given_up(http: TestClient) -> None:
    """Its process is killed; the next form has a new one. This one takes 20 s where it may."""
    assert post(http, {"type": "json_object"}).status_code == 200
    bomb = json_schema({"allOf": [{"type": "string", "pattern": f"x{i}.*y{i}"} for i in range(20)]})
    with patient(http, 0.5):
        assert "took over 0.5 seconds to compile" in refused(http, bomb)["message"]
    with patient(http, 60.0):
        assert post(http, {"type": "regex", "pattern": "ok"}).status_code == 200


def test_what_ends_the_process_is_refused_and_not_called_slow(
    http: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the library overflows its stack. The next form has a new process; the log has one line."""
    with patient(http, 60.0), caplog.at_level("WARNING"), ThreadPoolExecutor(1) as threads:
        assert post(http, {"type": "regex", "pattern": "before"}).status_code == 200
        process = process_of(http)
        assert process._child is not None
        process._child._process.send_signal(signal.SIGSTOP)
        waiting = threads.submit(refused, http, {"type": "regex", "pattern": "during"})
        assert wait_for(lambda: process._asking == 1)
        for end in (signal.SIGSEGV, signal.SIGCONT):
            process._child._process.send_signal(end)
        message = waiting.result()["message"]
        assert "its process was ended by SIGSEGV" in message
        assert "seconds" not in message
        assert post(http, {"type": "regex", "pattern": "after"}).status_code == 200
    [line] = caplog.records
    assert (line.exc_info, "SIGSEGV" in line.getMessage()) == (None, True)


def test_without_descriptors_a_new_form_is_a_503(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Without a traceback; a known one is not, and the next new one is compiled."""
    assert post(http, {"type": "json_object"}).status_code == 200
    http.portal.call(process_of(http)._drop)  # type: ignore[union-attr]
    new = {"type": "regex", "pattern": "descriptors"}
    with descriptors(3):
        assert "Too many open files" in error_of(post(http, new), 503)["message"]
        assert post(http, {"type": "json_object"}).status_code == 200
    assert [record.exc_info for record in caplog.records if record.levelname != "INFO"] == [None]
    assert post(http, new).status_code == 200


def test_many_new_forms_at_once_are_too_many(http: TestClient) -> None:
    process = process_of(http)
    process._asking = 16
    response = post(http, {"type": "regex", "pattern": "x"})
    assert error_of(response, 429)["param"] == "response_format"
    assert "Retry-After" in response.headers
    call = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}
    response = http.post("/v1/chat/completions", json=BODIES["/v1/chat/completions"] | call)
    assert error_of(response, 429)["param"] == "tools"
    process._asking = 0
    assert post(http, {"type": "regex", "pattern": "x"}).status_code == 200


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
    with serving(fresh) as http, ThreadPoolExecutor(2) as threads, patient(http, 60.0):
        assert post(http, {"type": "json_object"}).status_code == 200
        process = process_of(http)
        assert process._child is not None
        process._child._process.send_signal(signal.SIGSTOP)  # the longest of verdicts
        waiting = [threads.submit(post, http, {"type": "regex", "pattern": one}) for one in ("judged", "behind")]
        assert wait_for(lambda: process._asking == 2)
        http.portal.call(process.close)  # type: ignore[union-attr]
        for response in [*(one.result() for one in waiting), post(http, {"type": "regex", "pattern": "late"})]:
            assert error_of(response, 503)["code"] == "stopping"
            assert "retry-after" in response.headers
        assert process._child is None
        assert post(http, {"type": "json_object"}).status_code == 200  # judged before


def test_an_operator_s_bounds_are_in_the_grammar(client: ThreadClient) -> None:
    fresh = ThreadClient(FakeEngine(client.engine.info))
    with serving(fresh, json_max_characters=7, json_max_items=0, json_max_digits=3) as http:
        for schema in ({"type": "string"}, {"type": "array", "items": {"type": "integer"}}):
            assert post(http, json_schema(schema)).status_code == 200
            sampling = fresh.engine.requests[-1].sampling
            assert sampling is not None
            assert sampling.form == grammar_of(schema, FormLimits(7, 0, 3)) != grammar_of(schema)
