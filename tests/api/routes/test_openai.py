"""OpenAI's routes over a fake engine: the same tokens, text and scalings as POST /generate, in OpenAI's shape."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import ThreadClient, serving
from tests.api.test_errors import error_of
from tests.support.fake_engine import (
    CHAT_TEMPLATE,
    EXPERTS,
    FAULTY,
    MAX_MODEL_LEN,
    REPLY,
    UNTAKEN,
    FakeEngine,
    build_tokenizer,
    fake_info,
    gate_row,
    write_bundle,
)

PROMPT = list(range(40, 60))
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT_TEXT = "<user>hi"
ROUTES = {"/v1/completions": {"prompt": PROMPT}, "/v1/chat/completions": {"messages": MESSAGES}}


def post(http: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=ROUTES[path] | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chunks(http: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    response = http.post(path, json=ROUTES[path] | {"stream": True} | body)
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def text_of(choice: dict[str, Any]) -> str:
    text: str = choice["text"] if "text" in choice else choice.get("message", choice.get("delta"))["content"]
    return text


@pytest.mark.parametrize("path", ROUTES)
def test_an_answer(http: TestClient, path: str) -> None:
    answer = post(http, path, max_tokens=12, seed=7, n=2, model="fake")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert text_of(answer["choices"][0]) == build_tokenizer().decode(build_tokenizer().encode(REPLY).ids[:12])
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    prompt = 20 if path == "/v1/completions" else len(build_tokenizer().encode(CHAT_TEXT).ids)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 24,
        "total_tokens": prompt + 24,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert (answer["xlora"]["seed"], answer["model"]) == (7, "fake")
    assert answer["xlora"]["forward_passes"] > 0
    assert "xlora" not in answer["choices"][0]
    assert answer["system_fingerprint"] == "fp_" + "0" * 12


def test_weights_that_are_not_hashed_yet_have_a_fingerprint_too(http: TestClient, client: ThreadClient) -> None:
    """Of what is known without reading them."""
    assert client._info is not None
    client._info = replace(client._info, weights_sha256=None)
    assert post(http, "/v1/completions", max_tokens=1)["system_fingerprint"] == "fp_" + "1" * 12
    assert http.get("/info").json()["weights_sha256"] is None


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("burst", [1, 5])
def test_a_stream_adds_up_to_the_whole_answer(http: TestClient, client: ThreadClient, path: str, burst: int) -> None:
    client.engine.burst = burst
    body = {"max_tokens": 40, "stop": "END", "n": 2, "seed": 1, "xlora": {"return_scalings": "full"}}
    body["logprobs"] = True if "chat" in path else 1
    whole = post(http, path, **body)
    *parts, last = chunks(http, path, stream_options={"include_usage": True}, **body)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {part["usage"] for part in parts} == {None}
    assert {part["xlora"]["seed"] for part in parts} == {1}
    for choice in whole["choices"]:
        mine = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert "".join(text_of(c) for c in mine) == text_of(choice)
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        rows = [row for c in mine for row in c["xlora"]["scalings"]["mean"]]
        assert rows == choice["xlora"]["scalings"]["mean"]
        assert all(len(c["xlora"]["scalings"]["mean"]) == 1 for c in mine), "not one row per token"
        assert mine[0]["xlora"]["scalings"]["experts"] == EXPERTS
        for name, joined in choice["logprobs"].items():
            assert [item for c in mine for item in c["logprobs"][name] or []] == (joined or [])


def test_a_stop_string_within_a_burst_drops_what_comes_after(http: TestClient, client: ThreadClient) -> None:
    client.engine.burst = 50
    body = {"prompt": PROMPT, "max_tokens": 50, "stop": "END", "return_scalings": "mean", "logprobs": 0}
    output = http.post("/generate", json=body).json()["outputs"][0]
    ids = build_tokenizer().encode(REPLY[: REPLY.index("END") + 3]).ids
    assert (output["text"], output["token_ids"]) == (REPLY[: REPLY.index("END")], ids)
    expected = np.stack([gate_row(position).mean(axis=0) for position in range(19, 19 + len(ids))])
    np.testing.assert_allclose(output["scalings"]["mean"], expected, atol=1e-6)
    events = http.post("/generate", json=body | {"stream": True}).text.split("\n\n")[:-3]
    assert len(events) == len(ids)
    assert json.loads(events[-1][6:])["finish_reason"] == "stop"


def test_prompts_in_a_batch(http: TestClient) -> None:
    alone = [post(http, "/v1/completions", prompt=p, max_tokens=5, n=2)["choices"] for p in (PROMPT, [50, 51])]
    answer = post(http, "/v1/completions", prompt=[PROMPT, [50, 51]], max_tokens=5, n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [c["text"] for choices in alone for c in choices]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (22, 20)
    streamed = chunks(http, "/v1/completions", prompt=["ab", "c"], max_tokens=3)
    assert {c["index"] for part in streamed for c in part["choices"]} == {0, 1}


def test_one_prompt_that_fails_ends_its_batch_and_frees_the_rest(http: TestClient, client: ThreadClient) -> None:
    error_of(http.post("/v1/completions", json={"prompt": [PROMPT, [UNTAKEN]], "max_tokens": 5}), 500)
    post(http, "/v1/completions", max_tokens=1)
    assert not client.engine.choices
    assert http.get("/health").json()["requests_running"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_prompt_and_its_logprobs(http: TestClient, stream: bool) -> None:
    body = {"prompt": "Once", "echo": True, "logprobs": 1, "max_tokens": 2, "n": 2}
    if stream:
        found = chunks(http, "/v1/completions", **body)
        choices = [[c for part in found for c in part["choices"] if c["index"] == index] for index in (0, 1)]
        names = choices[0][0]["logprobs"]
        lists = [{name: [item for c in mine for item in c["logprobs"][name]] for name in names} for mine in choices]
        texts = ["".join(c["text"] for c in mine) for mine in choices]
    else:
        answer = post(http, "/v1/completions", **body)["choices"]
        lists, texts = [choice["logprobs"] for choice in answer], [choice["text"] for choice in answer]
    for text, logprobs in zip(texts, lists, strict=True):
        assert text.startswith("Once")
        assert "".join(logprobs["tokens"]) == text
        assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(logprobs["tokens"]) - 1)
        assert logprobs["top_logprobs"][0] is None
        assert max(logprobs["top_logprobs"][1].values()) == -0.5
        assert logprobs["text_offset"] == list(np.cumsum([0, *(len(t) for t in logprobs["tokens"][:-1])]))


def test_echo_without_logprobs_asks_the_engine_for_none(http: TestClient, client: ThreadClient) -> None:
    choice = post(http, "/v1/completions", prompt="Once", echo=True, max_tokens=2)["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("OnceThe", None)
    assert client.engine.requests[-1].sampling is not None
    assert client.engine.requests[-1].sampling.prompt_logprobs is None


def test_chat_logprobs(http: TestClient) -> None:
    entry = post(http, "/v1/chat/completions", max_tokens=1, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    token = entry["content"][0]
    assert (bytes(token["bytes"]).decode(), token["logprob"]) == (token["token"], -0.5)
    assert len(token["top_logprobs"]) == 2


def test_usage_in_every_chunk(http: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = chunks(http, "/v1/chat/completions", max_tokens=4, stream_options=options)
    assert [part["usage"]["completion_tokens"] for part in parts] == [1, 2, 3, 4, 4]


def test_messages_become_a_prompt_by_the_template(http: TestClient, client: ThreadClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts, "name": "me"}]
    post(http, "/v1/chat/completions", messages=messages, max_tokens=1)
    assert client.engine.requests[-1].prompt_token_ids == build_tokenizer().encode("<system>be<user>ab").ids


def test_wishes_reach_the_engine(http: TestClient, client: ThreadClient) -> None:
    wishes = {"cache_salt": "mine", "gate": {"freeze_after": 3}}
    post(http, "/v1/chat/completions", max_completion_tokens=2, xlora=wishes)
    http.post("/generate", json={"prompt": "a", "max_tokens": 2, **wishes})
    for request in client.engine.requests[-2:]:
        assert (request.cache_salt, request.freeze_after) == ("mine", 3)
        assert request.sampling is not None
        assert request.sampling.max_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_without_tokens_to_generate_the_prompts_are_scored(
    http: TestClient, stream: bool, logprobs: int | None
) -> None:
    """Also one that is a single token, of which there is nothing to say."""
    name = "max_completion_tokens" if stream else "max_tokens"
    body = {"prompt": ["Once", "a"], "echo": True, name: 0, "logprobs": logprobs}
    found = [post(http, "/v1/completions", **body)] if not stream else chunks(http, "/v1/completions", **body)
    choices = {choice["index"]: choice for part in found for choice in part["choices"]}
    assert [(choices[i]["text"], choices[i]["finish_reason"]) for i in (0, 1)] == [("Once", "length"), ("a", "length")]
    if logprobs is None:
        assert choices[0]["logprobs"] is None
        return
    once, single = choices[0]["logprobs"], choices[1]["logprobs"]
    assert (once["tokens"], once["token_logprobs"]) == (["O", "n", "c", "e"], [None, -0.5, -0.5, -0.5])
    assert once["top_logprobs"][1] == {"n": -0.5}
    assert (single["tokens"], single["token_logprobs"], single["top_logprobs"]) == (["a"], [None], [None])
    if not stream:
        assert found[0]["usage"]["completion_tokens"] == 0


def test_scoring_asks_the_engine_for_no_more_than_the_scores(http: TestClient, client: ThreadClient) -> None:
    body = {"prompt": "Once", "echo": True, "max_tokens": 0, "xlora": {"gate": {"freeze_after": 1, "top_k": 1}}}
    before = list(client.engine.requests)
    post(http, "/v1/completions", **body)
    assert client.engine.requests == before  # the prompt alone is asked for
    post(http, "/v1/completions", **body, logprobs=0)
    [request] = client.engine.requests[len(before) :]
    assert (request.score_from, request.freeze_after, request.steering is None) == (1, None, False)
    assert request.sampling is not None
    assert (request.sampling.max_tokens, request.sampling.prompt_logprobs) == (0, 0)
    for wrong, param in (({"n": 2}, "n"), ({"xlora": {"return_scalings": "mean"}}, "xlora"), ({"echo": False}, None)):
        error = error_of(http.post("/v1/completions", json={**body, **wrong}))
        assert error["param"] == (param or "max_tokens")


@pytest.mark.parametrize("stop", ["<|end|>", ["zzz", "<|end|>"]])
@pytest.mark.parametrize("path", [*ROUTES, "/generate"])
def test_a_stop_string_may_be_a_special_token(http: TestClient, client: ThreadClient, path: str, stop: Any) -> None:
    """Which has no text: it could not be found there."""
    end = build_tokenizer().token_to_id("<|end|>")
    client.engine._reply[4:4] = [end]
    body = ROUTES.get(path, {"prompt": PROMPT}) | {"max_tokens": 9, "ignore_eos": True}
    choice = http.post(path, json=body | {"stop": stop}).json()
    choice = choice["choices"][0] if path in ROUTES else choice["outputs"][0]
    assert (text_of(choice), choice["finish_reason"]) == ("The an", "stop")
    assert client.engine.requests[-1].sampling is not None
    assert client.engine.requests[-1].sampling.stop_token_ids == (end,)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_finish_reasons_are_openai_s_words(client: ThreadClient, path: str, stream: bool) -> None:
    """A timeout is "length" to its clients; ours are told by `xlora`."""
    client.engine.step_seconds = 0.3
    with serving(client) as http:
        body = {"timeout": 1, "max_tokens": 70}
        found = chunks(http, path, **body) if stream else [post(http, path, **body)]
        *before, last = [choice for part in found for choice in part["choices"]]
        assert (last["finish_reason"], last["xlora"]) == ("length", {"finish_reason": "timeout"})
        assert {choice["finish_reason"] for choice in before} <= {None}
        assert all("xlora" not in choice for choice in before)
        client.engine.step_seconds = 0.0
        assert "xlora" not in post(http, path, max_tokens=1)["choices"][0]


@pytest.mark.parametrize("path", ROUTES)
def test_what_tools_always_send_changes_nothing(http: TestClient, path: str) -> None:
    harmless: dict[str, Any] = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}}
    harmless |= {"store": False, "service_tier": "auto", "suffix": None, "function_call": None, "xlora": None}
    harmless |= {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"} if "chat" in path else {}
    harmless |= {} if "chat" in path else {"best_of": 1}
    ours, theirs = post(http, path, max_tokens=5, seed=1), post(http, path, max_tokens=5, seed=1, **harmless)
    assert ours["choices"] == theirs["choices"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"suffix": "x"}, "suffix"),
        ("/v1/completions", {"best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [""]}, "prompt"),
        ("/v1/completions", {"prompt": ["a", [1]]}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 257}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 100, "n": 3}, "n"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"xlora": {"experts": {"only": [1]}}}, "xlora.experts.only[0]"),
        ("/v1/completions", {"xlora": {"gate": {"top_k": 0}}}, "xlora.gate.top_k"),
        ("/v1/completions", {"experts": {"only": []}}, "experts"),
        ("/v1/completions", {"xlora": {"prompt": "a"}}, "xlora.prompt"),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools[0].function"),
        ("/v1/chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("/v1/chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        (
            "/v1/chat/completions",
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ("/v1/chat/completions", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        (
            "/v1/chat/completions",
            {"chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs.chat_template",
        ),
        ("/v1/chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("/v1/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages[0].nam"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            None,
        ),
        ("/v1/chat/completions", {"response_format": {"type": "xml"}}, "response_format.type"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 99}]}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    http: TestClient, path: str, body: dict[str, Any], param: str | None
) -> None:
    error = error_of(http.post(path, json=ROUTES[path] | body))
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


def test_a_close_name_is_suggested_inside_objects(http: TestClient) -> None:
    body = {"prompt": "a", "xlora": {"gate": {"freeze_aftr": 1}}}
    assert error_of(http.post("/v1/completions", json=body))["hint"] == "did you mean `freeze_after`?"


def test_models(http: TestClient) -> None:
    listed = http.get("/v1/models").json()
    assert (listed["object"], [model["id"] for model in listed["data"]]) == (
        "list",
        ["fake", "fake/base", *(f"fake/{name}" for name in EXPERTS)],
    )
    assert http.get("/v1/models/fake").json() == listed["data"][0]
    assert {model["max_model_len"] for model in listed["data"]} == {MAX_MODEL_LEN}
    assert http.get("/v1/models/fake/math").json() == listed["data"][2]
    assert error_of(http.get("/v1/models/fake/maths"), 404)["code"] == "model_not_found"
    for path, body in ROUTES.items():
        assert error_of(http.post(path, json=body | {"model": "gpt-9"}), 404)["param"] == "model"


def test_served_names(client: ThreadClient) -> None:
    """All of them are models with experts; answers have the one that was asked for, or the first."""
    with serving(client, served_model_name=["gpt", "org/mine"]) as http:
        listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert listed == [
            f"{name}{part}" for name in ("gpt", "org/mine") for part in ("", "/base", *(f"/{name}" for name in EXPERTS))
        ]
        for path in ROUTES:
            assert post(http, path, max_tokens=1)["model"] == "gpt"
            assert post(http, path, max_tokens=1, model="org/mine/math")["model"] == "org/mine/math"
            assert error_of(http.post(path, json=ROUTES[path] | {"model": "fake"}), 404)["param"] == "model"
        assert http.get("/info").json()["model"] == http.get("/health").json()["model"] == "gpt"
        assert http.post("/generate", json={"prompt": "a", "max_tokens": 1}).json()["model"] == "gpt"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "<user>x<assistant>The an:go"),
        ({"add_generation_prompt": True, "continue_final_message": False}, "<user>x<assistant>The an:go"),
        ({"add_generation_prompt": False, "chat_template_kwargs": {}}, "<user>x<assistant>The an"),
        ({"continue_final_message": True}, "<user>x<assistant>The an"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<user>x<assistant>The an"),
        ({"chat_template_kwargs": {"mood": [1.5, {"a": None}]}}, "<user>x<assistant>The an[1.5, {'a': None}]:go"),
    ],
)
def test_what_the_template_is_asked(tmp_path: Path, fields: dict[str, Any], text: str) -> None:
    template = CHAT_TEMPLATE + "{{ mood }}{% if add_generation_prompt %}:go{% endif %}"
    client = ThreadClient(FakeEngine(fake_info(write_bundle(tmp_path))))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The an"}]
    with serving(client) as http:
        post(http, "/v1/chat/completions", messages=messages, max_tokens=1, **fields)
    assert build_tokenizer().decode(client.engine.requests[-1].prompt_token_ids) == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_faulty_request_fails_alone(http: TestClient, stream: bool) -> None:
    body = {"prompt": [FAULTY], "stream": stream}
    assert "sampling" in error_of(http.post("/v1/completions", json=body), 500)["message"]
    post(http, "/v1/completions", max_tokens=1)


@pytest.mark.parametrize(
    ("wishes", "param", "code"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "invalid_response_format"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
            "tools",
            "invalid_tools",
        ),
    ],
)
def test_a_grammar_that_fails_is_the_fault_of_what_asked_for_it(
    http: TestClient, wishes: dict[str, Any], param: str, code: str
) -> None:
    messages = [{"role": "user", "content": build_tokenizer().decode([FAULTY])}]
    error = error_of(http.post("/v1/chat/completions", json={"messages": messages, **wishes}))
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_too_many_tokens_are_named_as_they_were_sent(http: TestClient, name: str) -> None:
    for more in ({}, {"min_tokens": 9001}):
        error = error_of(http.post("/v1/chat/completions", json={"messages": MESSAGES, name: 9000, **more}))
        assert error["param"] == ("min_tokens" if more else name)
        said = error["message"] + error.get("hint", "")
        assert set(re.findall(r"max_\w+", said)) == {name}


@pytest.mark.parametrize(
    ("stop", "arguments"),
    [
        (["name", "arguments", "f_other", 's":{', "} }"], '{"a":"x } y","b":{}}'),
        (['"b"'], '{"a":"x } y",'),
        ([" } "], '{"a":"x'),
        (["{"], None),
        (["}}"], '{"a":"x } y","b":{'),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_see_the_arguments_of_a_call_alone(
    http: TestClient, client: ThreadClient, stop: list[str], arguments: str | None, stream: bool
) -> None:
    """As where the function is named: what is written about them is no one's text."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "f_other")]
    written = '{"name":"f_other","arguments":{"a":"x } y","b":{}} }'
    before, client.engine._reply = client.engine._reply, build_tokenizer().encode(written).ids
    tokens = len(client.engine._reply)
    wishes = {"messages": MESSAGES, "tools": tools, "tool_choice": "required", "stop": stop, "max_tokens": tokens}
    answer = http.post("/v1/chat/completions", json=wishes | {"stream": stream})
    client.engine._reply = before
    choices = (
        [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n")[:-2]]
        if stream
        else answer.json()["choices"]
    )
    calls = [call for one in choices for call in one.get("delta", one.get("message")).get("tool_calls", ())]
    assert [call["function"]["name"] for call in calls[:1]] == ([] if arguments is None else ["f_other"])
    assert "".join(call["function"]["arguments"] for call in calls) == (arguments or "")
    is_whole = arguments == '{"a":"x } y","b":{}}'
    assert choices[-1]["finish_reason"] == ("length" if is_whole else "stop")
