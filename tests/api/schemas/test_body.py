"""A known field at null, empty or its neutral value is absent, at every depth; what says something is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import ThreadClient, serving
from tests.api.test_errors import error_of
from tests.support.fake_engine import FakeEngine, fake_info, write_bundle

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "Once", "max_tokens": 3, "seed": 1},
    COMPLETION: {"prompt": "Once", "max_tokens": 3, "seed": 1},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 1},
    "/compare": {"prompt": "Once", "max_tokens": 3, "seed": 1, "settings": [{}]},
}
OPENAI = (COMPLETION, CHAT)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> ThreadClient:
    return ThreadClient(FakeEngine(fake_info(write_bundle(tmp_path_factory.mktemp("fake")))))


@pytest.fixture(scope="module")
def http(client: ThreadClient) -> Iterator[TestClient]:
    """One for all: no request changes anything."""
    with serving(client, max_body_bytes=1 << 20) as http:
        yield http


def answer_of(http: TestClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """All of an answer but its id and its time."""
    response = http.post(path, json=body)
    assert response.status_code == 200, (body, response.text)
    answer: dict[str, Any] = response.json()
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


EMPTY = [
    *("top_k", "seed", "temperature", "top_p", "min_p", "stop", "stop_token_ids", "logit_bias", "response_format"),
    *("timeout", "ignore_eos", "presence_penalty", "repetition_penalty"),
]
NEUTRAL: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(({name: None}, tuple(BODIES)) for name in EMPTY if name != "seed"),
    ({"top_k": -1, "top_p": 1.0, "min_p": 0.0, "logit_bias": {}, "stop": [], "stop_token_ids": []}, tuple(BODIES)),
    ({"stop": [""], "repetition_penalty": 1, "response_format": {}}, tuple(BODIES)),
    ({"response_format": {"type": "text", "json_schema": None, "pattern": None}}, tuple(BODIES)),
    ({"response_format": {"type": "text", "json_schema": {}, "pattern": ""}}, tuple(BODIES)),
    ({"stop": ["zz", "zz"], "cache_salt": ""}, ("/generate", "/compare")),
    ({"experts": {}, "gate": {"top_k": None, "temperature": None}, "scalings_start": None}, ("/generate",)),
    ({"experts": {"only": None, "exclude": [], "weights": None}, "logprobs": False}, ("/generate",)),
    ({"settings": [{"experts": {}, "gate": {"freeze_after": None}, "label": "", "token_ids": None}]}, ("/compare",)),
    ({"stream_options": {"include_usage": None}, "stream": None}, OPENAI),
    ({"stream_options": {"include_usage": False, "continuous_usage_stats": False}}, OPENAI),
    ({"stream_options": {}, "metadata": {}, "user": "", "service_tier": None, "model": ""}, OPENAI),
    ({"suffix": "", "functions": [], "function_call": "none", "audio": None, "prediction": {}}, OPENAI),
    ({"function_call": "auto", "reasoning_effort": "none", "verbosity": "medium", "store": False}, OPENAI),
    ({"cache_control": {"type": "ephemeral", "ttl": "5m"}}, OPENAI),
    ({"cache_control": {"type": "ephemeral", "ttl": None}, "web_search_options": None}, OPENAI),
    ({"xlora": {"experts": None, "gate": {"top_k": None}, "cache_salt": "", "return_scalings": None}}, OPENAI),
    ({"xlora": {"experts": {}, "gate": {}}}, OPENAI),
    ({"logprobs": False, "best_of": 1, "echo": False}, (COMPLETION,)),
    ({"logprobs": False, "top_logprobs": 0}, (CHAT,)),
    ({"logprobs": None, "top_logprobs": 0, "tools": [], "tool_choice": "none", "modalities": []}, (CHAT,)),
    ({"tools": {}, "tool_choice": {}, "parallel_tool_calls": True}, (CHAT,)),
    ({"chat_template_kwargs": {"tools": None, "enable_thinking": None}}, (CHAT,)),
    ({"guided_json": None, "structured_outputs": {}}, OPENAI),
]


@pytest.mark.parametrize(("extra", "path"), [(extra, path) for extra, paths in NEUTRAL for path in paths])
def test_what_says_nothing_is_absent(http: TestClient, extra: dict[str, Any], path: str) -> None:
    plain, given = answer_of(http, path, BODIES[path]), answer_of(http, path, BODIES[path] | extra)
    for outputs in plain.get("outputs", ()), given.get("outputs", ()):
        for output in outputs:
            output.pop("label", None)
    assert given == plain


@pytest.mark.parametrize("name", ["xlora", "experts"])
def test_a_name_that_steers_goes_with_steering_that_says_nothing(http: TestClient, name: str) -> None:
    extra = {"xlora": {"experts": {"only": None}, "gate": {}}} if name == "experts" else {"xlora": {}}
    plain = answer_of(http, CHAT, BODIES[CHAT] | {"model": "fake/math"})
    assert answer_of(http, CHAT, BODIES[CHAT] | {"model": "fake/math"} | extra) == plain


@pytest.mark.parametrize("path", BODIES)
def test_a_seed_of_minus_one_is_drawn(http: TestClient, path: str) -> None:
    """Below 2^53: what JavaScript reads is what was drawn."""
    seeds = set()
    for _ in range(12):
        answer = answer_of(http, path, BODIES[path] | {"seed": -1})
        seeds.add(answer["seed"] if "seed" in answer else answer["xlora"]["seed"])
    assert len(seeds) == 12
    assert all(0 <= seed < 2**53 for seed in seeds)  # one of 63 bits would be 1 in 1024


WHOLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((path, {"max_tokens": 3.0, "seed": 1.0, "top_k": 4e0}, {"top_k": 4}) for path in BODIES),
    *((path, {"stop_token_ids": [7.0], "top_k": -1.0}, {"stop_token_ids": [7]}) for path in BODIES),
    ("/generate", {"prompt": [40.0, 41, 42.0], "n": 2.0}, {"prompt": [40, 41, 42], "n": 2}),
    ("/generate", {"gate": {"top_k": 2.0, "freeze_after": 1.0}}, {"gate": {"top_k": 2, "freeze_after": 1}}),
    ("/generate", {"logprobs": 2.0, "return_scalings": "mean", "scalings_start": 0.0},
     {"logprobs": 2, "return_scalings": "mean", "scalings_start": 0}),
    (COMPLETION, {"prompt": [[40.0], [41.0]]}, {"prompt": [[40], [41]]}),
    (CHAT, {"logprobs": True, "top_logprobs": 1.0}, {"logprobs": True, "top_logprobs": 1}),
    ("/compare", {"settings": [{"token_ids": [40.0, 41.0]}, {}]}, {"settings": [{"token_ids": [40, 41]}, {}]}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "written", "meant"), WHOLE)
def test_an_integer_may_have_a_point(
    http: TestClient, path: str, written: dict[str, Any], meant: dict[str, Any]
) -> None:
    assert answer_of(http, path, BODIES[path] | written) == answer_of(http, path, BODIES[path] | meant)


def test_an_integer_may_have_a_point_in_a_schema(http: TestClient, client: ThreadClient) -> None:
    def form_of(least: Any) -> Any:
        schema = {"type": "array", "items": {"const": least}, "minItems": least, "maxItems": least}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer_of(http, "/generate", BODIES["/generate"] | {"response_format": form})
        sampling = client.engine.requests[-1].sampling
        return sampling.form if sampling else None

    assert form_of(2.0) == form_of(2)
    assert form_of(2.0) is not None


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {"max_tokens": 2.5}, "max_tokens"),
        ("/generate", {"max_tokens": 1e300}, "max_tokens"),
        ("/generate", {"prompt": [1.5]}, "prompt"),
        ("/generate", {"seed": -2}, "seed"),
        ("/generate", {"temperature": ""}, "temperature"),  # what a field never takes is no way to say nothing
        ("/generate", {"ignore_eos": []}, "ignore_eos"),
        ("/generate", {"gate": []}, "gate"),
        (CHAT, {"stream_options": ""}, "stream_options"),
        ("/generate", {"top_k": -2}, "top_k"),
        ("/generate", {"logprobs": True}, "logprobs"),
        ("/generate", {"suffix": ""}, "suffix"),
        ("/generate", {"max_tokens": 0}, "max_tokens"),
        ("/generate", {"unheard_of": None}, "unheard_of"),
        ("/generate", {"gate": {"unheard_of": None}}, "gate.unheard_of"),
        ("/compare", {"settings": [{"token_ids": []}]}, "settings[0].token_ids"),
        (COMPLETION, {"suffix": "x"}, "suffix"),
        (COMPLETION, {"functions": [{"name": "f"}]}, "functions"),
        (COMPLETION, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"function_call": {"name": "f"}}, "function_call"),
        (CHAT, {"web_search_options": {}}, "web_search_options"),
        (CHAT, {"prediction": {"type": "content"}}, "prediction"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, {"tools": [TOOL]}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "auto"}}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"nam": "f"}}},
         "tool_choice.function.nam"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [TOOL, TOOL], "tool_choice": "required"}, "tools"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (CHAT, {"tools": [TOOL | {"custom": {"name": "x"}}], "tool_choice": "none"}, "tools[0].custom"),
        (CHAT, {"tools": [{"type": "web_search"}], "tool_choice": "none"}, "tools[0].type"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "paramters": {}}}], "tool_choice": "none"},
         "tools[0].function.paramters"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"metadata": {"a": 1}}, "metadata.a"),
        (CHAT, {"cache_control": {"type": "ephemeral", "tll": "5m"}}, "cache_control.tll"),
        (CHAT, {"cache_control": "ephemeral"}, "cache_control"),
        (CHAT, {"xlora": {"unheard_of": None}}, "xlora.unheard_of"),
    ],
)  # fmt: skip
def test_what_says_something_is_named(http: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    """In OpenAI's words, none of the validator's."""
    error = error_of(http.post(path, json=BODIES[path] | body))
    assert error["param"] == param
    for word in ("validation", "instance of", "dictionary", "Input", "List", "[TextPart]", "model"):
        assert word not in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"guided_json": {"type": "object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "response_format"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "within `function`"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "within `function`"),
        ({"modalities": ["text", "audio"]}, "'audio'"),
        ({"chat_template_kwargs": {"tools": [1]}}, "chat_template_kwargs.tools"),
    ],
)
def test_what_others_have_is_answered_with_what_is_here(http: TestClient, body: dict[str, Any], words: str) -> None:
    error = error_of(http.post(CHAT, json=BODIES[CHAT] | body))
    assert words in error["message"] + error.get("hint", "")


def test_stop_lists_are_long(http: TestClient) -> None:
    longest = ["x" * 1020 + f"{number:04d}" for number in range(64)]
    plain = answer_of(http, "/generate", BODIES["/generate"])
    assert answer_of(http, "/generate", BODIES["/generate"] | {"stop": longest + longest[:9]}) == plain
    for stop in ([*longest, "y"], ["x" * 1025], ["a", None], [["a"]]):
        assert error_of(http.post("/generate", json=BODIES["/generate"] | {"stop": stop}))["param"] == "stop"


def test_null_has_a_meaning_for_the_gate_at_run_time(tmp_path: Any) -> None:
    with serving(ThreadClient(FakeEngine(fake_info(write_bundle(tmp_path))))) as http:
        assert http.patch("/gate", json={"top_k_lora": 2.0, "scaling_pass_value": 0.5}).json()["top_k_lora"] == 2
        changed = http.patch("/gate", json={"top_k_lora": None, "scaling_pass_value": None}).json()
        assert (changed["top_k_lora"], changed["scaling_pass_value"]) == (None, None)
