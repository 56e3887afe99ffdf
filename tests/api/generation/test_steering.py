"""Steering by the names of the wire: what reaches a fake engine, what comes back, and the demo's real engine."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.contract.steering import GateWeight, Steering
from tests.api.conftest import ThreadClient
from tests.api.routes.test_openai import ROUTES, chunks, post
from tests.api.test_errors import error_of
from tests.support.fake_engine import EXPERTS
from tests.support.server_process import ROOT, Server

BY_LAYER = [{"weight": 0.5}, {"weight": -100.0, "layers": [1, 1]}]
WISHES: list[tuple[dict[str, Any], Steering | None]] = [
    ({"experts": {"only": ["tales", "math"]}}, Steering(only=(0, 2))),
    ({"experts": {"only": ["math", "code"], "exclude": ["math"]}}, Steering(only=(1,))),
    ({"experts": {"exclude": ["code"]}, "gate": {"temperature": 0.01}}, Steering(only=(0, 2), temperature=0.01)),
    ({"experts": {"only": []}}, Steering(weights=())),
    ({"experts": {"exclude": EXPERTS}}, Steering(weights=())),
    ({"experts": {"only": EXPERTS}}, None),
    ({"experts": {"weights": {}}}, Steering(weights=())),
    ({"experts": {"weights": {"tales": 100, "math": 0.5}}}, Steering(weights=(GateWeight(2, 100), GateWeight(0, 0.5)))),
    (
        {"experts": {"weights": {"code": BY_LAYER}}},
        Steering(weights=(GateWeight(1, 0.5), GateWeight(1, -100, (1, 1)))),
    ),
    ({"gate": {"temperature": 100.0, "top_k": 3}}, Steering(temperature=100, top_k=3)),
    ({"gate": {"freeze_after": 1}}, None),
    ({"gate": {"top_k": 1, "freeze_after": 2}}, Steering(top_k=1)),
]


@pytest.mark.parametrize(("wishes", "steering"), WISHES)
def test_wishes_reach_the_engine_and_come_back(
    http: TestClient, client: ThreadClient, wishes: dict[str, Any], steering: Steering | None
) -> None:
    """The same on every route, whole and as a stream."""
    body = {"prompt": "a", "max_tokens": 2, **wishes}
    answers = [http.post("/generate", json=body).json()]
    answers.append(json.loads(http.post("/generate", json=body | {"stream": True}).text.split("\n\n")[-3][6:]))
    for path in ROUTES:
        answers.append(post(http, path, max_tokens=2, xlora=wishes)["xlora"])
        answers += [chunk["xlora"] for chunk in chunks(http, path, max_tokens=2, xlora=wishes)]
    for answer in answers:
        assert {name: answer[name] for name in ("experts", "gate") if name in answer} == wishes
    assert len(client.engine.requests) >= 6
    for request in client.engine.requests[-6:]:
        assert request.steering == steering
        assert request.freeze_after == wishes.get("gate", {}).get("freeze_after")


def test_null_and_empty_are_absent(http: TestClient, client: ThreadClient) -> None:
    for wishes in ({"experts": None, "gate": None}, {"experts": {}, "gate": {}}, {"experts": {"only": None}}):
        answer = http.post("/generate", json={"prompt": "a", "max_tokens": 1, **wishes}).json()
        assert not {"experts", "gate"} & set(answer)
        assert client.engine.requests[-1].steering is None


def test_an_unknown_expert_is_named_with_those_there_are(http: TestClient) -> None:
    known = "the experts are math, code, tales"
    for experts, hint in (
        ({"only": ["tale"]}, f"did you mean `tales`? {known}"),
        ({"exclude": ["chemistry"]}, known),
        ({"weights": {"maths": 1}}, f"did you mean `math`? {known}"),
    ):
        error = error_of(http.post("/generate", json={"prompt": "a", "experts": experts}))
        assert (error["code"], error["hint"]) == ("unknown_expert", hint)
        assert error["param"] == f"experts.{next(iter(experts))}"


@pytest.mark.parametrize("path", ROUTES)
def test_models_by_name(http: TestClient, client: ThreadClient, path: str) -> None:
    for model, steering, experts in (
        ("fake", None, None),
        ("fake/base", Steering(weights=()), {"only": []}),
        ("fake/code", Steering(weights=(GateWeight(1, 1.0),)), {"weights": {"code": 1.0}}),
    ):
        answer = post(http, path, model=model, max_tokens=1, xlora={"return_scalings": "mean"})
        assert (answer["model"], answer["xlora"].get("experts")) == (model, experts)
        assert client.engine.requests[-1].steering == steering
    body = ROUTES[path] | {"model": "fake/code", "xlora": {"experts": {"only": ["math"]}}}
    assert error_of(http.post(path, json=body))["param"] == "xlora.experts"
    post(http, path, model="fake", max_tokens=1, xlora=body["xlora"])


# -- the demo ------------------------------------------------------------------------------------------------------

PROMPT = "Compute 48 + 87.\n"
GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


def complete(demo_server: Server, **body: Any) -> tuple[list[str], Any]:
    status, answer = demo_server.post("/v1/completions", {"prompt": PROMPT, **GREEDY, **body})
    assert status == 200, answer
    return [choice["text"] for choice in answer["choices"]], answer


def test_base_only_is_the_plain_decoder(demo_server: Server) -> None:
    path = ROOT / "model_store/demo/base"
    tokenizer = AutoTokenizer.from_pretrained(path)
    decoder = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    status, answer = demo_server.post("/generate", {"prompt": PROMPT, "experts": {"only": []}, **GREEDY})
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = decoder.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    assert (status, answer["outputs"][0]["token_ids"]) == (200, theirs.tolist())
    assert complete(demo_server, model="demo/base")[0] == [answer["outputs"][0]["text"]]


def test_an_expert_by_name_is_its_weight_1_at_every_layer(demo_server: Server) -> None:
    [named], answer = complete(demo_server, model="demo/math", xlora={"return_scalings": "mean"})
    assert {tuple(row) for row in answer["choices"][0]["xlora"]["scalings"]["mean"]} == {(1.0, 0.0, 0.0, 0.0)}
    assert answer["xlora"]["scaling_rows"] == 0
    last = max(int(site.split(".")[2]) for site in json.loads(demo_server.get("/info")[1])["sites"])
    by_layer = [{"weight": 3}, {"weight": 1, "layers": [0, last]}]
    for weight in (1, by_layer):
        assert complete(demo_server, xlora={"experts": {"weights": {"math": weight}}})[0] == [named]
    assert named != complete(demo_server, model="demo/base")[0][0]


def test_a_mixed_batch_is_what_each_is_alone(demo_server: Server) -> None:
    bodies: list[dict[str, Any]] = [{"model": name} for name in ("demo", "demo/base", "demo/math", "demo/tales")]
    bodies += [{"xlora": {"experts": {"exclude": ["math"]}}}, {"xlora": {"gate": {"temperature": 3.0, "top_k": 2}}}]
    alone = [complete(demo_server, **body)[0] for body in bodies]
    assert len({text for [text] in alone}) >= 4
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: complete(demo_server, **body)[0], bodies))
    assert together == alone
