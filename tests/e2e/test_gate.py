"""What the server says about its gate, against PEFT and against what a client computes from the full scalings."""

from __future__ import annotations

import base64
import io
import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.oracle import PeftOracle
from tests.support.server_process import Server

PROMPT = "the quick brown fox and the lazy dog; x + 1"
EXPERTS = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def oracle(tiny_bundle: Path) -> PeftOracle:
    return PeftOracle(tiny_bundle)


def post(server: Server, path: str, **body: Any) -> Any:
    status, answer = server.post(path, body)
    assert status == 200, answer
    return answer


def send(server: Server, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def tokens_of(server: Server, text: str) -> list[int]:
    ids: list[int] = post(server, "/tokenize", text=text)["token_ids"]
    return ids


def array_of(scalings: dict[str, Any]) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(base64.b64decode(scalings["full"])))
    return array


def by_hand(oracle: PeftOracle, gate: list[float] | None, ids: list[int]) -> torch.Tensor:
    """Logprobs [T - 1] of ids[1:]: PEFT's own gate, or the same weights at every site."""
    predict = oracle.classifier.forward

    def fixed(*args: Any, **kwargs: Any) -> torch.Tensor:
        scalings: torch.Tensor = predict(*args, **kwargs).clone()
        scalings[:] = torch.tensor(gate)
        return scalings

    if gate is not None:
        oracle.classifier.forward = fixed
    try:
        return oracle.logits(ids).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    finally:
        oracle.classifier.__dict__.pop("forward", None)


def samples(server: Server) -> dict[str, float]:
    lines = server.get("/metrics")[1].decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_metrics_are_what_a_client_computes(tiny_server: Server) -> None:
    """Entropy sums and counts by phase, expert weights, leads: over all positions of several requests, each once."""
    before, entropy, weight, leads = samples(tiny_server), {"prompt": 0.0, "generated": 0.0}, np.zeros(3), np.zeros(3)
    positions = {"prompt": 0, "generated": 0}
    for seed in range(3):
        body = {"return_scalings": "full", "scalings_start": 0, "max_tokens": 20, "ignore_eos": True, "seed": seed}
        answer = post(tiny_server, "/generate", prompt=f"{seed} {PROMPT}", cache_salt=f"m{seed}", **body)
        full = array_of(answer["outputs"][0]["scalings"]).astype(np.float64)
        p = full / full.sum(axis=-1, keepdims=True)
        nats = -(p * np.log(p)).sum(axis=-1).mean(axis=-1)
        last = answer["usage"]["prompt_tokens"] - 1
        for phase, part in (("prompt", nats[:last]), ("generated", nats[last:])):
            entropy[phase] += part.sum()
            positions[phase] += len(part)
        weight += p.mean(axis=1).sum(axis=0)
        leads += np.bincount(p.mean(axis=1).argmax(axis=1), minlength=3)
    after = samples(tiny_server)

    def grown(name: str, label: str, value: str) -> float:
        sample = f'{name}{{{label}="{value}"}}'
        return after[sample] - before[sample]

    for phase in entropy:
        assert grown("xlora_gate_entropy_nats_sum", "phase", phase) == pytest.approx(entropy[phase], rel=1e-3)
        ratio = grown("xlora_gate_entropy_ratio_sum", "phase", phase)
        assert ratio == pytest.approx(entropy[phase] / math.log(3), rel=1e-3)
        assert grown("xlora_gate_entropy_nats_count", "phase", phase) == positions[phase]
    for expert, name in enumerate(EXPERTS):
        assert grown("xlora_expert_weight_total", "expert", name) == pytest.approx(weight[expert], rel=1e-3)
        assert grown("xlora_expert_top1_tokens_total", "expert", name) == leads[expert]


def test_compare_equals_peft(tiny_server: Server, oracle: PeftOracle) -> None:
    """Every text under every gate; the diagonal is what generation said."""
    gates: list[list[float] | None] = [None, [0, 0, 0], [0.3, 0, 1]]
    settings = [{}, {"experts": {"only": []}}, {"experts": {"weights": {"alpha": 0.3, "gamma": 1}}}]
    answer = post(tiny_server, "/compare", prompt=PROMPT, settings=settings, max_tokens=12, seed=4, ignore_eos=True)
    prompt = tokens_of(tiny_server, PROMPT)
    outputs = [output["token_ids"] for output in answer["outputs"]]
    assert len({tuple(ids) for ids in outputs}) == 3
    for judge, gate in enumerate(gates):
        for text, ids in enumerate(outputs):
            expected = float(by_hand(oracle, gate, prompt + ids)[len(prompt) - 1 :].sum())
            assert answer["log_likelihood"]["sum"][judge][text] == pytest.approx(expected, abs=2e-3)
            assert answer["log_likelihood"]["per_token"][judge][text] == pytest.approx(expected / 12, abs=1e-3)
    given = [setting | {"token_ids": ids} for setting, ids in zip(settings, outputs, strict=True)]
    again = post(tiny_server, "/compare", prompt=PROMPT, settings=given)
    np.testing.assert_allclose(again["log_likelihood"]["sum"], answer["log_likelihood"]["sum"], atol=1e-3)
    own = [[token["logprob"] for token in output["tokens"]] for output in answer["outputs"]]
    theirs = [[token["logprob"] for token in output["tokens"]] for output in again["outputs"]]
    np.testing.assert_allclose(own, theirs, atol=1e-4)
    assert [output["text"] for output in again["outputs"]] == [output["text"] for output in answer["outputs"]]


def test_perplexity_equals_peft(tiny_server: Server, oracle: PeftOracle) -> None:
    """X-LoRA, the base, and each expert alone with weight 1."""
    found = post(tiny_server, "/scalings", prompt=PROMPT, perplexity=True)["perplexity"]
    ids = tokens_of(tiny_server, PROMPT)
    columns = [(found["xlora"], None), (found["base"], [0, 0, 0])]
    columns += [(found["experts"][name], torch.eye(3)[expert].tolist()) for expert, name in enumerate(EXPERTS)]
    for column, gate in columns:
        expected = by_hand(oracle, gate, ids)
        assert column["logprobs"][0] is None
        np.testing.assert_allclose(column["logprobs"][1:], expected, atol=1e-3)
        assert column["perplexity"] == pytest.approx(float((-expected.mean()).exp()), rel=1e-3)
    assert len({column["perplexity"] for column, _ in columns}) == 5


def test_log_is_pefts(tiny_server: Server, oracle: PeftOracle) -> None:
    """Enable, generate, fetch by length: the rows of PEFT's own log over the same text."""
    send(tiny_server, "PUT", "/scalings/log", {"enabled": True})
    try:
        bodies = [{"prompt": PROMPT[:n], "max_tokens": 6, "cache_salt": "log", "ignore_eos": True} for n in (9, 9, 30)]
        answers = [post(tiny_server, "/generate", **body) for body in bodies]
    finally:
        send(tiny_server, "PUT", "/scalings/log", {"enabled": False})
    arrays = np.load(io.BytesIO(tiny_server.get("/scalings/log.npz")[1]), allow_pickle=False)
    rows = {
        str(request): one
        for name in arrays
        if name.startswith("scalings_")
        for request, one in zip(arrays[name.replace("scalings", "request")], arrays[name], strict=True)
    }
    oracle.xlora.enable_scalings_logging()
    for body, answer in zip(bodies, answers, strict=True):
        text = tokens_of(tiny_server, body["prompt"]) + answer["outputs"][0]["token_ids"][:-1]
        oracle.logits(text)
        said = oracle.xlora.get_scalings_log()[-1][0].numpy()
        ours = rows[answer["id"]]
        assert len(ours) == len(text) - answer["usage"]["cached_tokens"]
        np.testing.assert_allclose(ours, said[answer["usage"]["cached_tokens"] :], atol=1e-5)
    oracle.xlora.disable_scalings_logging()
    assert send(tiny_server, "DELETE", "/scalings/log")["tokens"] == 0


def test_gate_at_run_time_is_pefts(tiny_server: Server, oracle: PeftOracle) -> None:
    """PATCH, as PEFT's three setters; DELETE, as it was."""
    ids = tokens_of(tiny_server, PROMPT)
    config = oracle.xlora.xlora_config
    try:
        send(tiny_server, "PATCH", "/gate", {"scaling_pass_value": None, "top_k_lora": 2, "global_scaling_weight": 0.7})
        found = post(tiny_server, "/scalings", prompt=PROMPT, perplexity=True, return_scalings="full")
    finally:
        send(tiny_server, "DELETE", "/gate")
    before = config.top_k_lora, config.global_scaling_weight, config.scaling_pass_value
    oracle.xlora.set_scaling_pass_value(None)
    oracle.xlora.set_topk_lora(2)
    oracle.xlora.set_global_scaling_weight(0.7)
    logits, scalings = oracle.forward(ids)
    oracle.xlora.set_topk_lora(before[0])
    oracle.xlora.set_global_scaling_weight(before[1])
    oracle.xlora.set_scaling_pass_value(before[2])
    np.testing.assert_allclose(array_of(found["scalings"]), scalings, atol=1e-5)
    expected = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found["perplexity"]["xlora"]["logprobs"][1:], expected, atol=1e-3)
    stored = post(tiny_server, "/scalings", prompt=PROMPT, perplexity=True)["perplexity"]["xlora"]["logprobs"]
    np.testing.assert_allclose(stored[1:], by_hand(oracle, None, ids), atol=1e-3)
