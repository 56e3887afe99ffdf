"""Logprobs in OpenAI's shapes tell bytes: joined they are the content, and no two tokens of a place share a key."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tokenizers import Tokenizer

from tests.api.conftest import ThreadClient, serving
from tests.support.fake_engine import FakeEngine, build_tokenizer, fake_info, write_bundle
from tests.support.sentencepiece_like import build_sentencepiece

CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "ignore_eos": True}
SPOKEN = " a ab  b🙂日本\n é <s\u2028\x85."


def speaking(path: Path, build: Callable[[], Tokenizer], text: str = SPOKEN) -> tuple[ThreadClient, int]:
    """A server with some tokenizer that says a text, and how many tokens that takes."""
    write_bundle(path)
    build().save(str(path / "tokenizer.json"))
    tokenizer = build()
    engine = FakeEngine(replace(fake_info(path), vocab_size=tokenizer.get_vocab_size(), eos_token_ids=[]))
    engine._reply = tokenizer.encode(text, add_special_tokens=False).ids
    return ThreadClient(engine), len(engine._reply)


def entries_of(http: TestClient, body: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The content of a chat's answer, and its logprobs."""
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        choice = response.json()["choices"][0]
        return choice["message"]["content"], choice["logprobs"]["content"]
    events = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    content = "".join(choice["delta"]["content"] for choice in choices)
    return content, [entry for choice in choices for entry in choice["logprobs"]["content"]]


@pytest.mark.parametrize("build", [build_tokenizer, build_sentencepiece, lambda: build_sentencepiece(metaspace=True)])
@pytest.mark.parametrize("stream", [False, True])
def test_joined_bytes_are_the_content(tmp_path: Path, build: Callable[[], Tokenizer], stream: bool) -> None:
    client, tokens = speaking(tmp_path, build)
    with serving(client) as http:
        body = CHAT | {"max_tokens": tokens, "logprobs": True, "top_logprobs": 5, "stream": stream}
        content, entries = entries_of(http, body)
    assert SPOKEN in content  # the normalizer of one puts a space before it
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == content.encode()
    for entry in entries:
        assert len({one["token"] for one in entry["top_logprobs"]}) == 5
        assert entry["top_logprobs"][0]["token"] == entry["token"]


def test_half_a_character_is_its_bytes(tmp_path: Path) -> None:
    """The four tokens of a smiley, none of which is a text."""
    client, tokens = speaking(tmp_path, build_tokenizer, "🙂")
    with serving(client) as http:
        _, entries = entries_of(http, CHAT | {"max_tokens": tokens, "logprobs": True})
        assert [entry["bytes"] for entry in entries] == [[240], [159], [153], [130]]
        assert [entry["token"] for entry in entries] == [f"bytes:\\x{byte:02x}" for byte in "🙂".encode()]
        body = {"prompt": "hi", "max_tokens": tokens, "logprobs": 5}
        logprobs = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        assert "".join(logprobs["tokens"]) == "🙂"
        assert [len(keys) for keys in logprobs["top_logprobs"]] == [5] * 4
        token = http.post("/generate", json=body).json()["outputs"][0]["tokens"][0]
        assert token["top_logprobs"][0]["text"] == "bytes:\\xf0"


def test_a_special_token_has_no_bytes(tmp_path: Path) -> None:
    client, _ = speaking(tmp_path, build_tokenizer, "ab<|end|>")
    with serving(client) as http:
        body = CHAT | {"max_tokens": 9, "logprobs": True, "stop": ["<|end|>"], "stream": False}
        content, entries = entries_of(http, body)
    assert (content, [entry["bytes"] for entry in entries]) == ("ab", [[97], [98], []])
    assert entries[-1]["token"] == "<|end|>"


def test_where_no_text_stands_before_a_space_is_dropped(tmp_path: Path) -> None:
    client, _ = speaking(tmp_path, build_sentencepiece, "a b")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<s>"}))
    with serving(client) as http:
        content, entries = entries_of(http, CHAT | {"max_tokens": 2, "logprobs": True})
    assert (content, [entry["bytes"] for entry in entries]) == ("a b", [[97], [32, 98]])


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_events_are_lines_to_every_reader(tmp_path: Path, path: str) -> None:
    """Python's splitlines, and others', take more for the end of a line than JSON escapes by itself."""
    text = "a\u2028b\u2029c\x85d\x1ce\x0bf"
    client, tokens = speaking(tmp_path, build_tokenizer, text)
    with serving(client) as http:
        body = (CHAT if "chat" in path else {"prompt": "hi"}) | {"max_tokens": tokens, "stream": True}
        answer = http.post(path, json=body).text
    lines = [line for line in answer.splitlines() if line]
    assert len(answer.splitlines()) == 2 * len(lines)
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    if path == "/generate":
        found = "".join(event.get("text", "") for event in events)
    else:
        choices = [event["choices"][0] for event in events]
        found = "".join(one["delta"]["content"] if "delta" in one else one["text"] for one in choices)
    assert found == text
