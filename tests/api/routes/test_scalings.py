"""POST /scalings: parts, groups, formats and several texts, against what a client computes from the full rows."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.api.gate_views.rows import Rows
from service.api.gate_views.view import View, divergence, over_sites, summarise
from service.api.generation import scaling_pass
from service.api.schemas.bodies import ScalingsBody
from service.contract.errors import InvalidRequestError
from tests.api.conftest import ThreadClient
from tests.support.fake_engine import EXPERTS, SITES, entropy_of, fake_info, gate_row, write_bundle

PROMPT = list(range(65, 85))  # 20 tokens; row 10 is all-zero
TEXT = "a <b>'\n\x00=1 🙂"  # without the characters whose token makes the fake engine fail


def ask(http: TestClient, **body: Any) -> Any:
    answer = http.post("/scalings", json={"prompt": PROMPT} | body)
    assert answer.status_code == 200, answer.text
    return answer.json() if answer.headers["content-type"] == "application/json" else answer


def error(http: TestClient, **body: Any) -> dict[str, Any]:
    answer = http.post("/scalings", json={"prompt": PROMPT} | body)
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def full_rows(http: TestClient) -> np.ndarray:
    encoded = ask(http, return_scalings="full")["scalings"]["full"]
    array: np.ndarray = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    return array.astype(np.float64)


def client_entropy(rows: np.ndarray) -> float:
    """[positions, S, E] -> nats, mean over the positions with weights."""
    known = [entropy_of(row) for row in rows if row.any()]
    return float(np.mean(known)) if known else math.nan


def client_top1(rows: np.ndarray) -> list[float]:
    leads = [int(row.mean(axis=0).argmax()) for row in rows]
    return [leads.count(expert) / len(leads) for expert in range(rows.shape[-1])]


def test_the_default_is_the_design(http: TestClient) -> None:
    answer = ask(http)
    assert set(answer) == {"id", "model", "tokens", "scalings", "totals", "top1", "entropy", "usage"}
    assert set(answer["scalings"]) == {"experts", "sites", "start", "mean", "entropy"}
    assert answer == ask(http, granularity="token", format="json", select={}) | {"id": answer["id"]}
    full = full_rows(http)
    np.testing.assert_allclose(answer["scalings"]["mean"], full.mean(axis=1), atol=1e-6)
    assert answer["entropy"] == pytest.approx(client_entropy(full), abs=1e-6)
    assert list(answer["top1"].values()) == pytest.approx(client_top1(full))
    assert answer["scalings"]["entropy"][10] is None


@pytest.mark.parametrize("span", [(0, None), (3, 9), (10, 11), (19, 500)])
@pytest.mark.parametrize(
    ("granularity", "groups"),
    [("site", {SITES[0]: [0], SITES[1]: [1]}), ("layer", {"layers.0": [0], "layers.1": [1]}), ("module_type", None)],
)
def test_groups(http: TestClient, granularity: str, groups: dict[str, list[int]] | None, span: Any) -> None:
    groups = groups or {"q_proj": [0, 1]}
    part = full_rows(http)[span[0] : span[1]]
    answer = ask(http, granularity=granularity, select={"start": span[0], "stop": span[1]})
    found = answer["groups"]
    assert "scalings" not in answer
    assert (found["names"], found["experts"], found["granularity"]) == (list(groups), EXPERTS, granularity)
    for number, sites in enumerate(groups.values()):
        rows = part[:, sites]
        np.testing.assert_allclose(found["mean"][number], rows.mean(axis=(0, 1)), atol=1e-6)
        entropy = client_entropy(rows)
        assert found["entropy"][number] == (None if math.isnan(entropy) else pytest.approx(entropy, abs=1e-6))
        assert found["top1"][number] == pytest.approx(client_top1(rows))


@pytest.mark.parametrize("kind", ["mean", "full"])
def test_a_part_of_everything(http: TestClient, kind: str) -> None:
    select = {"start": 4, "stop": 12, "layers": [1], "experts": ["tales", "math"]}
    answer = ask(http, return_scalings=kind, select=select)
    part = full_rows(http)[4:12][:, [1]]
    shown = answer["scalings"]
    assert (shown["start"], shown["sites"], shown["experts"]) == (4, [SITES[1]], ["math", "tales"])
    np.testing.assert_allclose(shown["mean"], part.mean(axis=1)[:, [0, 2]], atol=1e-6)
    expected = [None if math.isnan(value) else pytest.approx(value, abs=1e-6) for value in map(entropy_of, part)]
    assert shown["entropy"] == expected, "not of all experts"
    assert [token["id"] for token in answer["tokens"]] == PROMPT[4:12]
    assert list(answer["totals"]) == list(answer["top1"]) == ["math", "tales"]
    assert answer["totals"]["tales"] == pytest.approx(part[:, :, 2].mean(), abs=1e-6)
    assert answer["usage"]["scaling_rows"] == 12, "positions after the part were computed"
    if kind == "full":
        array = np.load(io.BytesIO(base64.b64decode(shown["full"])), allow_pickle=False)
        np.testing.assert_array_equal(array, part[:, :, [0, 2]].astype(np.float32))


def test_sites_of_a_deeper_model(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.experts.{layer}.{type}" for layer in range(3) for type in ("up_proj", "w1")]
    info = dataclasses.replace(fake_info(write_bundle(tmp_path)), sites=[*names, "lm_head"])

    def view(**select: Any) -> View:
        return View.of(ScalingsBody(prompt="a", granularity="layer", select=select), info)

    assert view().groups() == {
        **{f"model.layers.{layer}": [2 * layer, 2 * layer + 1] for layer in range(3)},
        "lm_head": [6],
    }
    assert view(layers=[2, 0], module_types=["w1"]).sites == [1, 5]
    assert view(sites=["lm_head"]).groups() == {"lm_head": [0]}
    by_type = dataclasses.replace(view(layers=[1, 2]), granularity="module_type").groups()
    assert by_type == {"up_proj": [0, 2], "w1": [1, 3]}
    for select, param in (
        ({"layers": [3]}, "select.layers"),
        ({"sites": ["lm_heed"]}, "select.sites"),
        ({"module_types": ["model"]}, "select.module_types"),
        ({"experts": ["maths"]}, "select.experts"),
        ({"sites": ["lm_head"], "layers": [0]}, "select"),
    ):
        with pytest.raises(InvalidRequestError) as raised:
            view(**select)
        assert raised.value.param == param
        assert raised.value.hint


def test_entropy_where_some_sites_are_silent() -> None:
    full = np.array([[[0.5, 0.5], [0, 0]], [[0, 0], [0, 0]], [[-1, 1], [2, 0]]], np.float32)
    rows = over_sites(Rows(0, full.mean(axis=1), np.zeros(3, np.float32), full), [0, 1])
    np.testing.assert_allclose(rows.entropy, [math.log(2), math.nan, math.log(2) / 2], rtol=1e-6)
    assert summarise(rows).entropy == pytest.approx(math.log(2) * 0.75)


def test_several_texts(http: TestClient) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT[:3]]
    answer = ask(http, prompt=prompts, granularity="site")
    assert set(answer) == {"id", "model", "texts", "divergence", "usage"}
    for prompt, text in zip(prompts, answer["texts"], strict=True):
        alone = ask(http, prompt=prompt, granularity="site")
        assert text == {name: alone[name] for name in ("tokens", "groups", "totals", "top1", "entropy")} | {
            "shares": text["shares"]
        }
    full = full_rows(http)
    means = [full.mean(axis=1), full[:3].mean(axis=1), full[:3].mean(axis=1)]
    shares = [np.mean([row / row.sum() for row in mean if row.any()], axis=0) for mean in means]
    for text, share in zip(answer["texts"], shares, strict=True):
        assert list(text["shares"].values()) == pytest.approx(share, abs=1e-6)
    for i, p in enumerate(shares):
        for j, q in enumerate(shares):
            middle = (p + q) / 2
            expected = ((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2
            assert answer["divergence"][i][j] == pytest.approx(expected, abs=1e-6)
    assert answer["divergence"][0][1] > 1e-4
    assert answer["usage"]["prompt_tokens"] == 26
    assert len(ask(http, prompt=["Th"])["texts"]) == 1


def test_divergence_from_nothing_to_everything() -> None:
    one, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert divergence(one, one) == 0
    assert divergence(one, other) == pytest.approx(math.log(2))
    assert math.isnan(divergence(one, np.full(2, math.nan)))


def test_a_text_without_weights_has_no_divergence(http: TestClient) -> None:
    answer = ask(http, prompt=[PROMPT, PROMPT], select={"start": 10, "stop": 11})
    assert answer["divergence"] == [[None, None]] * 2
    assert answer["texts"][0]["shares"] == dict.fromkeys(EXPERTS)
    assert answer["texts"][0]["entropy"] is None


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, lambda full: full.mean(axis=1)),
        ({"return_scalings": "full"}, lambda full: full),
        ({"granularity": "site"}, lambda full: full.mean(axis=0)),
        (
            {"granularity": "module_type", "select": {"experts": ["code"]}},
            lambda full: full.mean(axis=(0, 1))[None, 1:2],
        ),
    ],
)
def test_npy(http: TestClient, body: dict[str, Any], expected: Any, dtype: str | None) -> None:
    answer = ask(http, **body, format="npy", scalings_dtype=dtype)
    array = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert (answer.headers["content-type"], array.dtype) == ("application/octet-stream", dtype or "float32")
    np.testing.assert_allclose(array, expected(full_rows(http)), atol=1e-3 if dtype else 1e-6)


def test_csv_of_tokens(http: TestClient) -> None:
    answer = ask(http, prompt=[TEXT, "The other"], format="csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    first = [row for row in rows if row["text"] == "0"]
    assert "".join(row["token"] for row in first) == TEXT
    other = ask(http, prompt="The other")["tokens"]
    assert [int(row["token_id"]) for row in rows if row["text"] == "1"] == [token["id"] for token in other]
    for row in rows:
        expected = gate_row(int(row["position"]))
        assert [float(row[name]) for name in EXPERTS] == pytest.approx(expected.mean(axis=0), abs=1e-6)
        entropy = entropy_of(expected)
        assert (
            row["entropy_nats"] == "" if math.isnan(entropy) else float(row["entropy_nats"]) == pytest.approx(entropy)
        )


def test_csv_of_groups_equals_json(http: TestClient) -> None:
    body = {"granularity": "layer", "select": {"experts": ["math", "tales"]}}
    header, *rows = csv.reader(io.StringIO(ask(http, **body, format="csv").text, newline=""))
    groups = ask(http, **body)["groups"]
    assert header == ["text", "layer", "math", "tales", "entropy_nats"]
    assert [row[1] for row in rows] == groups["names"]
    np.testing.assert_allclose([[float(cell) for cell in row[2:4]] for row in rows], groups["mean"], atol=1e-6)


@pytest.mark.parametrize("kind", ["svg", "png"])
@pytest.mark.parametrize("body", [{}, {"prompt": [TEXT]}, {"granularity": "site"}, {"perplexity": True}], ids=str)
def test_pictures_are_refused_with_who_draws(
    http: TestClient, client: ThreadClient, kind: str, body: dict[str, Any]
) -> None:
    client.engine.requests.clear()
    found = error(http, **body, format=kind)
    assert (found["param"], found["code"]) == ("format", "invalid_request")
    assert found["message"] == (f"`format` should be 'json', 'npy' or 'csv': the server no longer draws (got '{kind}')")
    assert found["hint"] == "the page at / draws, and so does `xlora-serve scalings --png FILE`"
    assert not client.engine.requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [[1, 999]]}, "prompt"),
        ({"prompt": ["a"], "format": "npy"}, "prompt"),
        ({"granularity": "head"}, "granularity"),
        ({"format": "gif"}, "format"),
        ({"format": "SVG"}, "format"),
        ({"format": ["svg"]}, "format"),
        ({"granularity": "site", "return_scalings": "full"}, "return_scalings"),
        ({"format": "csv", "return_scalings": "full"}, "return_scalings"),
        ({"format": "csv", "scalings_dtype": "float16"}, "scalings_dtype"),
        ({"scalings_dtype": "float16"}, "scalings_dtype"),
        ({"select": {"start": -1}}, "select.start"),
        ({"select": {"start": 20}}, "select.start"),
        ({"select": {"start": 5, "stop": 5}}, "select"),
        ({"select": {"stop": 0}}, "select"),
        ({"select": {"start": True}}, "select.start"),
        ({"select": {"sites": []}}, "select.sites"),
        ({"select": {"sites": "layers.0.q_proj"}}, "select.sites"),
        ({"select": {"layers": [2]}}, "select.layers"),
        ({"select": {"experts": ["nobody"]}}, "select.experts"),
        ({"select": {"site": ["a"]}}, "select.site"),
    ],
)
def test_bad_bodies(http: TestClient, client: ThreadClient, body: dict[str, Any], param: str) -> None:
    client.engine.requests.clear()
    assert error(http, **body)["param"] == param
    assert not client.engine.requests


def test_sizes_are_bounded(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_pass, "MAX_WEIGHTS", 2 * 20 * 3)
    ask(http, granularity="site")
    assert error(http, prompt=[PROMPT, [1]], granularity="site")["code"] == "too_large"
    ask(http, prompt=[PROMPT, PROMPT])
