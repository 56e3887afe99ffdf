"""What a request gets that does not say: all that fits, the operator's default, the base's own sampling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.api.generation.sampling_defaults import SamplingDefaults
from service.contract.errors import StartupError
from service.contract.request import SamplingParams
from service.settings import Settings
from tests.api.conftest import ThreadClient, serving
from tests.api.test_errors import error_of
from tests.support.fake_engine import MAX_MODEL_LEN, REPLY, FakeEngine, build_tokenizer, fake_info, write_bundle

BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "abc"},
    "/v1/completions": {"prompt": ["abc"]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}]},
    "/compare": {"prompt": "abc", "settings": [{}, {"experts": {"only": []}}]},
}


def sampling_of(client: ThreadClient, path: str, **settings: Any) -> list[SamplingParams]:
    """What the engine is asked for, by one body of its own and by bodies with one field more."""
    with serving(client, **settings) as http:
        assert http.post(path, json=BODIES[path]).status_code == 200
        if settings.get("default_max_tokens"):
            assert http.get("/info").json()["sampling_defaults"]["max_tokens"] == settings["default_max_tokens"]
    return [one.sampling for one in client.engine.requests if one.sampling is not None and one.sampling.max_tokens]


@pytest.mark.parametrize("path", BODIES)
def test_max_tokens_is_what_the_context_leaves(client: ThreadClient, path: str) -> None:
    [_, sampling, *_] = sampling_of(client, path)  # the first is the warm-up's
    request = client.engine.requests[1]
    assert sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_token_ids)


@pytest.mark.parametrize("path", BODIES)
def test_the_operator_s_default(client: ThreadClient, path: str) -> None:
    [_, sampling, *_] = sampling_of(client, path, default_max_tokens=5)
    assert sampling.max_tokens == 5


def test_a_default_yields_to_the_context_and_to_min_tokens(client: ThreadClient) -> None:
    with serving(client, default_max_tokens=50) as http:
        for prompt, more, expected in (
            ("a" * 80, {}, 16),
            ("a", {"min_tokens": 60}, 60),
            ("a", {"max_tokens": 70}, 70),
        ):
            http.post("/generate", json={"prompt": prompt, **more})
            assert client.engine.requests[-1].sampling is not None
            assert client.engine.requests[-1].sampling.max_tokens == expected
        error = error_of(http.post("/generate", json={"prompt": "a" * 80, "min_tokens": 17}))
        assert (error["param"], "at most 16" in error["message"]) == ("min_tokens", True)
        error = error_of(http.post("/generate", json={"prompt": "a", "min_tokens": 17, "max_tokens": 16}))
        assert error["param"] == "min_tokens"


def test_a_pool_that_holds_less_than_the_context(tmp_path: Path) -> None:
    """Two streams of 3 blocks each, of 16 positions."""
    client = ThreadClient(FakeEngine(replace(fake_info(write_bundle(tmp_path)), kv_blocks_total=7)))
    [_, sampling] = sampling_of(client, "/generate")
    assert sampling.max_tokens == 48 - 3


def test_a_comparison_gets_what_its_bounds_allow(client: ThreadClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could ask for as much itself, and not for more."""
    monkeypatch.setattr("service.api.routes.compare.MAX_SCORED_TOKENS", 80)
    body = {
        "prompt": "abc",
        "settings": [{}, {"experts": {"only": []}}, {"token_ids": [41, 42]}, {"gate": {"top_k": 1}}],
    }
    with serving(client) as http:
        assert {output["finish_reason"] for output in http.post("/compare", json=body).json()["outputs"]} == {
            "length",
            None,
        }
        sampling = client.engine.requests[1].sampling
        assert sampling is not None
        assert sampling.max_tokens == (80 // 4 - 2) // 3
        assert http.post("/compare", json=body | {"max_tokens": 6}).status_code == 200
        assert error_of(http.post("/compare", json=body | {"max_tokens": 7}))["code"] == "too_large"


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
         {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}),
        ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1},
         {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"temperature": 0.6, "eos_token_id": 258, "max_new_tokens": 9, "top_k": None},
         {"temperature": 0.6, "max_tokens": 9}),
    ],
)  # fmt: skip
def test_the_base_s_own_sampling(
    tmp_path: Path, client: ThreadClient, stated: dict[str, Any], expected: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    absent = SamplingParams(max_tokens=MAX_MODEL_LEN - 1)
    with serving(client, generation_config="auto") as http:
        for said in ({}, {"temperature": 0.5, "max_tokens": 3}):
            http.post("/generate", json={"prompt": "a", "seed": 0, **said})
            assert client.engine.requests[-1].sampling == replace(absent, **{**expected, **said})
        assert http.get("/info").json()["sampling_defaults"] == {"max_tokens": None} | expected


def test_without_being_asked_it_changes_nothing(tmp_path: Path, client: ThreadClient) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.1}))
    assert sampling_of(client, "/generate")[1].temperature == 1.0


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("max_new_tokens", 0)])
def test_a_generation_config_that_no_request_could_ask_for(tmp_path: Path, name: str, value: int) -> None:
    info = fake_info(write_bundle(tmp_path))
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(StartupError, match=rf"generation_config.json: {name} is {value}: "):
        SamplingDefaults.of(Settings(generation_config="auto"), info)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_wait_for_min_tokens(client: ThreadClient, stream: bool) -> None:
    """The reply says "END" over and over: the first one that is complete later ends it."""
    first = len(build_tokenizer().encode(REPLY[: REPLY.index("END") + 3]).ids)
    with serving(client) as http:
        for least, expected in ((0, REPLY.split("END")[0]), (first - 1, REPLY.split("END")[0]), (first, None)):
            body = {"prompt": "a", "stop": "END", "min_tokens": least, "stream": stream}
            response = http.post("/generate", json=body)
            if stream:
                events = [json.loads(event[6:]) for event in response.text.split("\n\n")[:-3]]
                text, reason = "".join(event["text"] for event in events), events[-1]["finish_reason"]
            else:
                [output] = response.json()["outputs"]
                text, reason = output["text"], output["finish_reason"]
            assert reason == "stop"
            assert text == (REPLY + REPLY.split("END")[0] if expected is None else expected)
