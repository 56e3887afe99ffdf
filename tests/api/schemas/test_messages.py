"""History as clients keep it: what an answer's message was goes back in; what cannot be read is refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletion, ParsedChatCompletionMessage

from service.api.schemas.messages import Message
from tests.api.conftest import ThreadClient, serving
from tests.api.test_errors import error_of
from tests.support.fake_engine import FakeEngine, build_tokenizer, fake_info, write_bundle

CHAT = "/v1/chat/completions"
ASK = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> ThreadClient:
    return ThreadClient(FakeEngine(fake_info(write_bundle(tmp_path_factory.mktemp("fake")))))


@pytest.fixture(scope="module")
def http(client: ThreadClient) -> Iterator[TestClient]:
    with serving(client) as http:
        yield http


def prompt_of(http: TestClient, client: ThreadClient, *messages: dict[str, Any]) -> str:
    """The text that the template makes of some messages."""
    response = http.post(CHAT, json={"messages": list(messages), "max_tokens": 1})
    assert response.status_code == 200, response.text
    ids = client.engine.requests[-1].prompt_token_ids
    return str(build_tokenizer().decode(ids, skip_special_tokens=False))


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NULLS = dict.fromkeys(
    ("tool_calls", "tool_call_id", "function_call", "audio", "refusal", "annotations", "name", "parsed", "id",
     "reasoning_content", "reasoning", "cache_control", "provider_specific_fields", "images", "thinking_blocks"),
)  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [
        *({name: None} for name in NULLS),
        *({name: ""} for name in ("name", "id", "refusal", "reasoning_content", "reasoning", "parsed")),
        {"annotations": [], "cache_control": {}, "provider_specific_fields": {}},
        *({name: empty} for name in ("tool_calls", "function_call", "audio", "images") for empty in ([], {}, "")),
        NULLS,
        {"id": "msg_1", "annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}]},
        {"parsed": {"kind": "owl", "legs": [1.0, None]}, "cache_control": {"type": "ephemeral"}},
        {"parsed": [], "provider_specific_fields": {"refusal": None}},
        {"reasoning_content": "hm", "reasoning": "hm"},  # this template leaves it out
    ],
)
@pytest.mark.parametrize("role", ["assistant", "user", "system"])
def test_a_message_says_what_its_text_says(
    http: TestClient, client: ThreadClient, role: str, extra: dict[str, Any]
) -> None:
    found = prompt_of(http, client, {"role": role, "content": "yes", **extra}, ASK)
    assert found == f"<{role}>yes<user>a"


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({}, ""),
        ({"content": None}, ""),
        ({"content": ""}, ""),
        ({"content": []}, ""),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": None, "tool_calls": [], "function_call": None}, ""),
        ({"content": [{"type": "text", "text": "x", "id": "p", "cache_control": {"type": "ephemeral"}}]}, "x"),
        ({"content": [{"type": "text", "text": "x", "image_url": None, "input_audio": None, "file": None}]}, "x"),
        ({"content": [{"type": "text", "text": "x", "id": None, "cache_control": None, "refusal": ""}]}, "x"),
        ({"content": [{"type": "text", "text": ""}, {"type": "text", "text": "y"}]}, "y"),
    ],
)
def test_what_an_assistant_said(http: TestClient, client: ThreadClient, turn: dict[str, Any], text: str) -> None:
    assert prompt_of(http, client, ASK, {"role": "assistant", **turn}, ASK) == f"<user>a<assistant>{text}<user>a"


def test_answers_go_back_in(http: TestClient, client: ThreadClient) -> None:
    """As openai's own types keep them, with all that these have."""
    answer = http.post(CHAT, json={"messages": [ASK], "max_tokens": 3}).json()
    message = ChatCompletion.model_validate(answer).choices[0].message
    said = f"<user>a<assistant>{message.content}<user>a"
    assert prompt_of(http, client, ASK, answer["choices"][0]["message"], ASK) == said
    assert prompt_of(http, client, ASK, message.model_dump(), ASK) == said
    parsed = ParsedChatCompletionMessage[Any](**message.model_dump() | {"parsed": {"kind": "owl"}})
    assert prompt_of(http, client, ASK, parsed.model_dump(), ASK) == said


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        ({}, {}),
        ({"index": 0, "custom": None, "provider_specific_fields": {"x": 1}}, {}),
        ({"id": None, "type": None}, {"id": None}),
        ({"function": {"name": "f", "arguments": "", "parsed_arguments": {"a": 1}}}, {}),
        ({"function": {"name": "f", "arguments": None}}, {}),
    ],
)
def test_templates_see_calls_and_results(call: dict[str, Any], seen: dict[str, Any]) -> None:
    expected = {name: value for name, value in (CALL | seen).items() if value is not None}
    message = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [CALL | call]})
    assert message.to_template() == {"role": "assistant", "content": "", "tool_calls": [expected]}
    result = Message.model_validate({"role": "tool", "content": "", "tool_call_id": "c"})
    assert result.to_template() == {"role": "tool", "content": "", "tool_call_id": "c"}


def test_templates_see_reasoning() -> None:
    message = Message.model_validate({"role": "assistant", "content": "4", "reasoning_content": "2+2", "name": "me"})
    assert message.to_template() == {"role": "assistant", "content": "4", "reasoning_content": "2+2", "name": "me"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "user", "content": ["a"]}, "content"),
        ({"content": "a"}, "role"),
        ({"role": "function", "content": "x", "name": "f"}, "role"),
        ({"role": "tool", "tool_call_id": "c"}, "content"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, ""),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, ""),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, "tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [CALL | {"custom": {"name": "f"}}]}, "tool_calls[0].custom"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": {}}}]},
         "tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"arguments": "{}"}}]},
         "tool_calls[0].function.name"),
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "function_call"),
        ({"role": "assistant", "content": "", "audio": {"id": "a"}}, "audio"),
        ({"role": "user", "content": "x", "nam": None}, "nam"),
        ({"role": "user", "content": "x", "cache_control": {"type": "for ever"}}, "cache_control.type"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content[0].image_url"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "image_url": "y"}]}, "content[0].image_url"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "file", "file": {"id": "x"}}]},
         "content[1].file"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "cache": None}]}, "content[0].cache"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}] * 257}, "content"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(http: TestClient, message: dict[str, Any], param: str) -> None:
    """In OpenAI's words: no name of a class, no way through a union."""
    error = error_of(http.post(CHAT, json={"messages": [ASK, message]}))
    assert error["param"] == f"messages[1].{param}".removesuffix(".")
    for word in ("Part", "Message", "instance", "validation", "List"):
        assert word not in error["message"]


@pytest.mark.parametrize("messages", [["a"], [None], {"role": "user"}, [], None, "a"])
def test_what_is_no_list_of_messages(http: TestClient, messages: Any) -> None:
    error = error_of(http.post(CHAT, json={"messages": messages}))
    assert error["param"].startswith("messages")
    assert "Message" not in error["message"]
