"""POST /generate and POST /scalings over a fake engine: text, tokens, scalings, stops, choices, usage."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import ThreadClient
from tests.support.fake_engine import EXPERTS, MAX_MODEL_LEN, REPLY, SITES, build_tokenizer, entropy_of, gate_row

PROMPT = list(range(40, 60))  # three steps of the fake engine's prefill


def generate(http: TestClient, **body: Any) -> dict[str, Any]:
    response = http.post("/generate", json={"prompt": PROMPT, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(http: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = http.post("/generate", json={"prompt": PROMPT, "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def expected_mean(start: int, end: int) -> np.ndarray:
    return np.stack([gate_row(position) for position in range(start, end)]).mean(axis=1)


def test_text_tokens_and_seed(http: TestClient) -> None:
    answer = generate(http, max_tokens=12, seed=7)
    output = answer["outputs"][0]
    ids = build_tokenizer().encode(REPLY).ids[:12]
    assert (answer["seed"], answer["model"]) == (7, "fake")
    assert output["token_ids"] == ids
    assert output["text"] == build_tokenizer().decode(ids)
    assert "".join(token["text"] for token in output["tokens"]) == output["text"]
    assert output["finish_reason"] == "length"
    assert "scalings" not in output
    assert "logprob" not in output["tokens"][0]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["forward_passes"]) == (20, 12, 14)
    assert usage["lookahead"] == {"hits": 0, "misses": 0}
    assert usage["drafts"] == {"lookahead": [], "prompt_lookup": []}


def test_drafts_are_told_by_depth_and_choices_summed(http: TestClient, client: ThreadClient) -> None:
    """Two choices get 4, 4 and 3 tokens in three steps each."""
    client.engine.burst = 4
    usage = generate(http, max_tokens=11, n=2)["usage"]
    depths = [{"depth": depth, "drafted": count, "accepted": count} for depth, count in ((1, 6), (2, 6), (3, 4))]
    failed = [{"depth": depth, "drafted": count, "accepted": 0} for depth, count in ((1, 0), (2, 0), (3, 2), (4, 4))]
    assert usage["drafts"] == {"lookahead": depths, "prompt_lookup": failed}
    assert usage["lookahead"] == {"hits": 16, "misses": 0}
    assert usage["speculation"] == {"tokens": 6, "accepted": 0}
    assert (usage["completion_tokens"], usage["forward_passes"]) == (22, 10)
    assert "xlora_sequence_forwards_total 10.0" in http.get("/metrics").text.splitlines()


def test_a_seed_is_drawn_anew_each_time(http: TestClient) -> None:
    assert generate(http, max_tokens=1)["seed"] != generate(http, max_tokens=1)["seed"]


@pytest.mark.parametrize("start", [None, 0, 5, 19])
def test_rows_run_from_the_start_to_the_position_that_produced_the_last_token(
    http: TestClient, start: int | None
) -> None:
    scalings = generate(http, max_tokens=6, return_scalings="mean", scalings_start=start)["outputs"][0]["scalings"]
    first = 19 if start is None else start
    assert (scalings["start"], scalings["experts"], scalings["sites"]) == (first, EXPERTS, SITES)
    np.testing.assert_allclose(scalings["mean"], expected_mean(first, 19 + 6), atol=1e-6)
    for position, entropy in enumerate(scalings["entropy"], start=first):
        expected = entropy_of(gate_row(position))
        assert entropy is None if np.isnan(expected) else entropy == pytest.approx(expected, abs=1e-6)
    assert "full" not in scalings


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_full_is_a_npy_file(http: TestClient, dtype: str | None) -> None:
    output = generate(http, max_tokens=3, return_scalings="full", scalings_dtype=dtype)["outputs"][0]
    array = np.load(io.BytesIO(base64.b64decode(output["scalings"]["full"])), allow_pickle=False)
    assert array.dtype == np.dtype(dtype or "float32")
    np.testing.assert_allclose(array, np.stack([gate_row(position) for position in range(19, 22)]), atol=1e-3)


@pytest.mark.parametrize("stop", [None, "END", ["zzz", "naïve 🙂"]])
@pytest.mark.parametrize("start", [None, 0])
def test_a_stream_adds_up_to_the_whole_answer(http: TestClient, stop: Any, start: int | None) -> None:
    body = {"max_tokens": 45, "stop": stop, "return_scalings": "full", "scalings_start": start, "logprobs": 1, "n": 2}
    whole, (*parts, last) = generate(http, seed=1, **body), events(http, seed=1, **body)
    for output in whole["outputs"]:
        mine = [part for part in parts if part["index"] == output["index"]]
        assert "".join(part["text"] for part in mine) == output["text"]
        assert [id for part in mine for id in part["token_ids"]] == output["token_ids"]
        assert [token for part in mine for token in part["tokens"]] == output["tokens"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [output["finish_reason"]]
        assert [row for part in mine for row in part["scalings"]["mean"]] == output["scalings"]["mean"]
        assert mine[0]["scalings"]["start"] == output["scalings"]["start"]
        assert len(mine[0]["scalings"]["mean"]) == (1 if start is None else 20)
        assert mine[0]["scalings"]["experts"] == EXPERTS
    assert (last["seed"], last["usage"]["completion_tokens"]) == (1, whole["usage"]["completion_tokens"])


def test_a_stop_string_ends_text_tokens_and_rows_and_the_engine_hears_of_it(
    http: TestClient, client: ThreadClient
) -> None:
    answer = generate(http, max_tokens=60, stop=["END"], return_scalings="mean", logprobs=0)
    output = answer["outputs"][0]
    ids = build_tokenizer().encode(REPLY[: REPLY.index("END") + 3]).ids
    assert output["text"] == REPLY[: REPLY.index("END")]
    assert output["token_ids"] == ids
    assert len(output["tokens"]) == len(output["scalings"]["mean"]) == len(ids)
    assert output["finish_reason"] == "stop"
    generate(http, max_tokens=1)  # the engine has applied everything by now
    assert (answer["id"], 0) in client.engine.aborted


def test_the_token_that_ends_generation_is_a_token_and_no_text(http: TestClient) -> None:
    full_stop = build_tokenizer().encode(".").ids[0]
    output = generate(http, max_tokens=60, stop_token_ids=[full_stop])["outputs"][0]
    assert output["text"] == REPLY[: REPLY.index(".")]
    assert (output["token_ids"][-1], output["tokens"][-1]["text"]) == (full_stop, ".")
    assert output["finish_reason"] == "stop"


def test_logprobs(http: TestClient) -> None:
    token = generate(http, max_tokens=1, logprobs=2)["outputs"][0]["tokens"][0]
    assert token["logprob"] == -0.5
    assert [set(alternative) for alternative in token["top_logprobs"]] == [{"id", "text", "logprob"}] * 2


def test_choices_differ_and_are_indexed(http: TestClient) -> None:
    outputs = generate(http, max_tokens=4, n=3)["outputs"]
    assert [output["index"] for output in outputs] == [0, 1, 2]
    assert len({output["text"] for output in outputs}) == 3


def test_the_default_length_shrinks_to_what_fits(http: TestClient) -> None:
    assert generate(http)["usage"]["completion_tokens"] == MAX_MODEL_LEN - 20


def test_null_is_absent(http: TestClient) -> None:
    names = http.get("/openapi.json").json()["components"]["schemas"]["GenerateBody"]["properties"]
    nulls = dict.fromkeys(set(names) - {"prompt", "max_tokens"})
    assert generate(http, max_tokens=2, **nulls)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("kind", [None, "mean", "full"])
def test_scalings_of_a_text(http: TestClient, kind: str | None) -> None:
    answer = http.post("/scalings", json={"prompt": PROMPT, "return_scalings": kind}).json()
    mean = expected_mean(0, 20)
    np.testing.assert_allclose(answer["scalings"]["mean"], mean, atol=1e-6)
    assert answer["scalings"]["start"] == 0
    assert ("full" in answer["scalings"]) == (kind == "full")
    assert [token["id"] for token in answer["tokens"]] == PROMPT
    assert list(answer["totals"].values()) == pytest.approx(mean.mean(axis=0))
    assert sum(answer["top1"].values()) == pytest.approx(1)


def test_metrics_tell_what_happened(http: TestClient) -> None:
    generate(http, max_tokens=5)
    http.post("/generate", json={"prompt": ""})
    text = http.get("/metrics").text
    for line in (
        'xlora_requests_total{endpoint="/generate",outcome="ok"} 1.0',
        'xlora_requests_total{endpoint="/generate",outcome="invalid"} 1.0',
        "xlora_prompt_tokens_total 20.0",
        "xlora_generated_tokens_total 5.0",
        "xlora_sequence_forwards_total 7.0",
        "xlora_time_to_first_token_seconds_count 1.0",
        "xlora_inter_token_latency_seconds_count 4.0",
        "xlora_request_latency_seconds_count 1.0",
        "xlora_queue_time_seconds_count 1.0",
        "xlora_requests_running 0.0",
    ):
        assert line in text.splitlines()
