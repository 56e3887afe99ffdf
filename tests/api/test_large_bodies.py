"""What a large body may cost everybody else: sizes are checked before items, one mistake is one error, and long texts
are tokenized off the event loop. Times are measured by benchmarks/stalls.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer

from benchmarks.large_bodies import METHODS, Kind, kinds
from service.api.generation.tokenizer import MAX_CALL_TOKENS, MAX_TOKENIZED, ModelTokenizer
from service.api.middleware.json_body import MAX_COMMAS, MAX_PARTS, count, whole_numbers
from service.api.off_loop import SHORT_TOKENS, off_loop
from service.contract.errors import InvalidRequestError
from tests.api.conftest import ThreadClient, serving
from tests.api.test_errors import JSON, error_of
from tests.support.fake_engine import FakeEngine, fake_info, write_bundle

BODY_BYTES = 1 << 20
ALLOWED = {("white space", "/gate"), ("allowed text", "/tokenize"), ("allowed ids", "/detokenize")}
SHORT_ANSWER = 2000  # bytes
HOSTILE = ("1" + 400 * "0", "-1" + 400 * "0", "1e999", "-0.0", "NaN", "true", '"1"', "1.5", "[]", "{}")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An application that takes bodies of two MiB."""
    client = ThreadClient(FakeEngine(fake_info(write_bundle(tmp_path_factory.mktemp("roomy")))))
    with serving(client, max_body_bytes=2 * BODY_BYTES) as http:
        yield http


def send(http: TestClient, path: str, body: bytes | str) -> Any:
    return http.request(METHODS.get(path, "POST"), path, content=body, headers=JSON)


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: f"{kind.path} {kind.name}")
def test_a_large_body_gets_one_short_error(roomy: TestClient, kind: Kind) -> None:
    """But for those that are within the bounds of the tokenizer's routes, and one that says nothing in many bytes."""
    response = send(roomy, kind.path, kind.payload(BODY_BYTES))
    if (kind.name, kind.path) in ALLOWED:
        assert response.status_code == 200
    else:
        error_of(response)
        assert len(response.content) < SHORT_ANSWER


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"token_ids": [""] * 1000}),
        ("/compare", {"prompt": "a", "settings": [{"token_ids": [""] * 1000}]}),
        ("/generate", {"prompt": "a", "experts": {"weights": {"math": [{}] * 1000}}}),
        ("/generate", {"prompt": "a", "experts": {"weights": {str(name): [{}] for name in range(1025)}}}),
        ("/generate", {"prompt": "a", "experts": {"only": [0] * 1000}}),
        ("/generate", {str(name): 0 for name in range(1000)}),
        ("/generate", {"prompt": "a", "gate": {str(name): 0 for name in range(1000)}}),
        ("/scalings", {"prompt": "a", "select": {"sites": [0] * 1000}}),
        ("/scalings", {"prompt": "a", "select": {"layers": [""] * 1000}}),
        ("/v1/completions", {"prompt": "a", "metadata": {str(name): 0 for name in range(1000)}}),
        ("/v1/chat/completions", {"messages": [{}] * 1000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 200}]}),
    ],
)
def test_many_mistakes_are_few_errors(roomy: TestClient, path: str, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a microsecond in pydantic and several here."""
    seen: list[int] = []
    init = RequestValidationError.__init__

    def counted(self: RequestValidationError, errors: Any, **given: Any) -> None:
        seen.append(len(errors))
        init(self, errors, **given)

    monkeypatch.setattr(RequestValidationError, "__init__", counted)
    error_of(send(roomy, path, json.dumps(body)))
    assert seen
    assert max(seen) <= 10


def test_every_route_with_a_body_reads_it_so(roomy: TestClient) -> None:
    app = roomy.app
    assert isinstance(app, FastAPI)
    documented = app.openapi()["paths"]
    with_body = {path for path, operations in documented.items() for one in operations.values() if "requestBody" in one}
    assert with_body == {"/generate", "/compare", "/scalings", "/scalings/log", "/gate", "/tokenize", "/detokenize",
                         "/v1/completions", "/v1/chat/completions"}  # fmt: skip
    for path in with_body:
        assert error_of(send(roomy, path, "[" + "[]," * MAX_PARTS + "0]"))["code"] == "too_large"


def test_sizes_are_counted_outside_strings(roomy: TestClient) -> None:
    text = '[{":,' * 40_000
    assert error_of(send(roomy, "/generate", json.dumps({"prompt": text})))["code"] == "context_length_exceeded"
    ids = "0," * MAX_COMMAS + "0"
    assert error_of(send(roomy, "/generate", f'{{"prompt": [{ids}]}}'))["code"] == "context_length_exceeded"
    error = error_of(send(roomy, "/generate", f'{{"prompt": [{ids},0]}}'))
    assert error["code"] == "too_large"
    assert error["message"].startswith(f"the body has {MAX_COMMAS + 1} commas between values; at most {MAX_COMMAS}")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(JSON_VALUES, st.booleans())
def test_the_count_is_of_what_json_has(value: Any, ascii: bool) -> None:
    def parts(one: Any) -> int:
        if isinstance(one, dict):
            return 1 + len(one) + sum(map(parts, one.values()))
        return 1 + sum(map(parts, one)) if isinstance(one, list) else int(isinstance(one, str))

    def commas(one: Any) -> int:
        if not isinstance(one, dict | list):
            return 0
        return max(0, len(one) - 1) + sum(map(commas, one.values() if isinstance(one, dict) else one))

    assert count(json.dumps(value, ensure_ascii=ascii).encode()) == (parts(value), commas(value))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"prompt": "a",, "n": 1}', "line 1 column 16"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "number out of range"),
        ('{"prompt": "\\ud800"}', "hex escape"),
        (b'{"prompt": "\xff"}', "unicode"),
        ("[" * 10_000 + "]" * 10_000, "recursion limit"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 1 column 1"),
    ],
)
def test_what_is_not_json(roomy: TestClient, body: bytes | str, message: str) -> None:
    error = error_of(send(roomy, "/generate", body))
    assert error["code"] == "invalid_json"
    assert error["message"].startswith("the body cannot be read as JSON: ")
    assert message in error["message"]


def test_json_is_read_as_ever(roomy: TestClient) -> None:
    """A byte order mark is skipped, the last of equal names counts, integers are exact."""
    body = b'\xef\xbb\xbf{"prompt": "b", "prompt": "a", "max_tokens": 1, "seed": 9223372036854775807}'
    answer = send(roomy, "/generate", body).json()
    assert answer["usage"]["prompt_tokens"] == 1
    assert answer["seed"] == 2**63 - 1


def test_names_in_errors_are_short(roomy: TestClient) -> None:
    name = "x" * 100_000
    for body in ({name: 0}, {"gate": {name: 0}}, {"experts": {"weights": {name: "b"}}}, {"experts": {"only": [name]}}):
        response = send(roomy, "/generate", json.dumps({"prompt": "a", **body}))
        error_of(response)
        assert len(response.content) < SHORT_ANSWER
    error = error_of(send(roomy, "/compare", json.dumps({"prompt": "a", "settings": [{"experts": {name: 1}}]})))
    assert error["param"] == f"settings[0].experts.{'x' * 60}…"
    error = error_of(send(roomy, "/generate", json.dumps({"prompt": {"a": [{"b": ["c" * 10_000] * 9}] * 9}})))
    assert len(error["message"]) < 200


def test_an_unknown_field_goes_before_the_size_of_others(roomy: TestClient) -> None:
    body = {"prompt": 5, "metadata": dict.fromkeys(map(str, range(99)), "a"), "promt": "a"}
    assert error_of(send(roomy, "/v1/completions", json.dumps(body)))["param"] == "promt"
    null = {"prompt": "a", "max_tokens": 1, "functions": None, "model": "fake"}
    assert send(roomy, "/v1/completions", json.dumps(null)).status_code == 200


def _places(schema: dict[str, Any], schemas: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Where a value may stand in a body: paths of names and, for lists, 0."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[1]]
    for one in schema.get("anyOf", ()):
        yield from _places(one, schemas)
    for name, one in schema.get("properties", {}).items():
        yield (name,)
        yield from ((name, *rest) for rest in _places(one, schemas))
    for step, keyword in ((0, "items"), ("1", "additionalProperties")):
        if isinstance(one := schema.get(keyword), dict):
            yield (step,)
            yield from ((step, *rest) for rest in _places(one, schemas))


REQUIRED: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "a", "max_tokens": 1},
    "/compare": {"prompt": "a", "max_tokens": 1, "settings": [{}]},
    "/scalings": {"prompt": "a"},
    "/scalings/log": {"enabled": False},
    "/gate": {},
    "/tokenize": {"text": "a"},
    "/detokenize": {"token_ids": [1]},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}


def _with(body: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a body with a value at a place; what leads there is made."""
    if not place:
        return value
    step, *rest = place
    if step == 0:
        return [_with(body[0] if isinstance(body, list) else {}, tuple(rest), value)]
    known = dict(body) if isinstance(body, dict) else {}
    return known | {step: _with(known.get(step), tuple(rest), value)}


@pytest.mark.parametrize("path", REQUIRED)
def test_no_number_anywhere_is_a_surprise(roomy: TestClient, path: str) -> None:
    """Every field of every body, at every depth, gets numbers that are too large, not finite, or none at all."""
    document = roomy.get("/openapi.json").json()
    operation = document["paths"][path][METHODS.get(path, "POST").lower()]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    places = sorted(set(_places(schema, document["components"]["schemas"])), key=repr)
    assert len(places) >= len(REQUIRED[path])
    for place in places:
        template = json.dumps(_with(REQUIRED[path], place, "@"))
        for number in HOSTILE:
            response = send(roomy, path, template.replace('"@"', number))
            assert response.status_code in (200, 400, 404), (place, number[:9], response.text)
            assert len(response.content) < 1 << 16
    assert roomy.get("/livez").status_code == 200


def test_a_refused_body_is_given_back_at_once(roomy: TestClient) -> None:
    """No cycle of an error and its frames keeps a body until a garbage collection."""
    bodies = ('{"prompt": 5}', '{"prompt": "a", "x": 1}', '{"prompt": ', '{"prompt": "a", "logit_bias": [1]}', "[]")
    gc.collect()
    gc.disable()
    try:
        for body in bodies:
            error_of(send(roomy, "/generate", body))
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kept = [one for one in gc.garbage if isinstance(one, RequestValidationError | ValidationError | ValueError)]
        assert kept == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_a_whole_number_is_an_integer_at_every_depth() -> None:
    """And nothing else is changed: JSON Schema calls 16.0 an integer."""
    value = {"a": 16.0, "b": [1.0, {"c": [[-0.0, 2.5, "1.0"]]}, 3], "d": 1e300, "e": 2.0**63, "f": None, "g": True}
    expected = {"a": 16, "b": [1, {"c": [[0, 2.5, "1.0"]]}, 3], "d": 1e300, "e": 2.0**63, "f": None, "g": True}
    found = whole_numbers(value)
    assert json.dumps(found) == json.dumps(expected)
    assert [json.dumps(whole_numbers(one)) for one in (5.0, "5.0", float("nan"), -1e999, [])] == [
        "5",
        '"5.0"',
        "NaN",
        "-Infinity",
        "[]",
    ]


def tokenizer_of(path: Path, **info: Any) -> tuple[ModelTokenizer, Tokenizer]:
    """A tokenizer, and the tokenizer that is its oracle."""
    made = replace(fake_info(write_bundle(path)), **info)
    return ModelTokenizer(made), Tokenizer.from_file(made.tokenizer_path)


def test_long_texts_have_the_tokenizers_ids(tmp_path: Path) -> None:
    """In pieces they are only counted."""
    tokenizer, oracle = tokenizer_of(tmp_path, max_model_len=1 << 18)
    for text in ("naïve 🙂 " * 5000, "a" * 40_000, "a"):
        assert asyncio.run(tokenizer.prompt_ids(text)) == oracle.encode(text).ids
        assert tokenizer.tokenize(text, False, 1 << 18) == oracle.encode(text, add_special_tokens=False).ids


def test_an_empty_prompt_is_the_beginning_of_a_text(tmp_path: Path) -> None:
    """The tokenizer's own, else what its configuration names; only of a model that has none it is no prompt."""
    bare, _ = tokenizer_of(tmp_path)
    with pytest.raises(InvalidRequestError, match="`prompt` is empty"):
        asyncio.run(bare.prompt_ids(""))
    for token in ("<|end|>", {"content": "<|end|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
        named = ModelTokenizer(fake_info(tmp_path))
        assert asyncio.run(named.all_prompt_ids(["", "a"])) == [[258], [64]]
        with pytest.raises(InvalidRequestError, match="is empty"):
            asyncio.run(named.prompt_ids([]))
        with pytest.raises(InvalidRequestError, match="`messages` is empty"):
            asyncio.run(named.encode("", False, "messages"))
    demo = Path(__file__).parents[2] / "model_store" / "demo" / "base" / "tokenizer.json"
    own = ModelTokenizer(replace(fake_info(tmp_path), tokenizer_path=str(demo)))
    assert asyncio.run(own.prompt_ids("")) == [0]


def test_a_text_far_over_the_context_is_not_tokenized_to_its_end(tmp_path: Path) -> None:
    tokenizer, _ = tokenizer_of(tmp_path)
    with pytest.raises(InvalidRequestError, match="more than 96 tokens, and the context holds 96") as refused:
        asyncio.run(tokenizer.prompt_ids("🙂" * 500_000))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(InvalidRequestError, match="has 97 tokens"):
        asyncio.run(tokenizer.prompt_ids("a" * 97))
    with pytest.raises(InvalidRequestError, match="more than 96") as refused:
        asyncio.run(tokenizer.encode("a" * 100_000, False, "messages"))
    assert refused.value.param == "messages"


def test_the_prompts_of_one_call_are_bounded_together(tmp_path: Path) -> None:
    tokenizer, _ = tokenizer_of(tmp_path, max_model_len=4096)
    with pytest.raises(
        InvalidRequestError, match=f"the first 129 prompts have {129 * 4096} tokens; at most"
    ) as refused:
        asyncio.run(tokenizer.all_prompt_ids([[1] * 4096] * 200))
    assert (refused.value.code, MAX_CALL_TOKENS) == ("too_large", 128 * 4096)
    assert len(asyncio.run(tokenizer.all_prompt_ids([[1] * 4096] * 128))) == 128


def test_tokenize_and_detokenize_are_bounded(roomy: TestClient) -> None:
    error = error_of(send(roomy, "/tokenize", json.dumps({"text": "a" * (MAX_TOKENIZED + 1)})))
    assert (error["param"], error["code"]) == ("text", "too_large")
    assert error["message"].startswith(f"`text` has {MAX_TOKENIZED + 1} tokens; at most {MAX_TOKENIZED}")
    assert (
        f"more than {MAX_TOKENIZED}"
        in error_of(send(roomy, "/tokenize", json.dumps({"text": "a" * 800_000})))["message"]
    )
    error = error_of(send(roomy, "/detokenize", json.dumps({"token_ids": [1] * (MAX_TOKENIZED + 1)})))
    assert (error["param"], error["code"]) == ("token_ids", "too_large")
    answer = send(roomy, "/tokenize", json.dumps({"text": "ab" * 10_000})).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_ids"])
    assert send(roomy, "/detokenize", json.dumps({"token_ids": answer["token_ids"]})).json() == {"text": "ab" * 10_000}


def test_long_work_leaves_the_loop() -> None:
    here = threading.get_ident()
    assert asyncio.run(off_loop(threading.get_ident, tokens=SHORT_TOKENS)) == here
    assert asyncio.run(off_loop(threading.get_ident, tokens=SHORT_TOKENS + 1)) != here


def test_the_loop_goes_on_while_a_long_text_is_tokenized(tmp_path: Path) -> None:
    """The interpreter's lock is given up: otherwise the loop would turn once before the work, and once after it."""
    tokenizer, _ = tokenizer_of(tmp_path, max_model_len=1 << 21)

    async def turns() -> int:
        work, count = asyncio.create_task(tokenizer.prompt_ids("Once upon a time " * 60_000)), 0
        while not work.done():
            await asyncio.sleep(0.001)
            count += 1
        await work
        return count

    assert asyncio.run(turns()) >= 10


def test_an_echo_is_written_off_the_loop(roomy: TestClient) -> None:
    """The same, whether the prompt comes back in one piece or as events."""
    body = {"prompt": "a" * 90, "n": 8, "echo": True, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    whole = send(roomy, "/v1/completions", json.dumps(body)).json()
    streamed = send(roomy, "/v1/completions", json.dumps({**body, "stream": True})).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    for choice in whole["choices"]:
        parts = [one["text"] for event in events for one in event["choices"] if one["index"] == choice["index"]]
        assert choice["text"] == "".join(parts)
        assert choice["text"].startswith("a" * 90)
