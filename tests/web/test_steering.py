"""Two settings of one prompt: what the page sends, and what it shows side by side.

The server's own steering is tested elsewhere; where a test needs an answer to a steered request from a server that
may not know the fields yet, the test answers it.
"""

from __future__ import annotations

import json
import math
import re
from difflib import SequenceMatcher
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.support.inspector import ANSWER, exported_json, run
from tests.support.server_process import Server

SETTINGS: dict[str, dict[str, Any] | None] = {
    "": None,
    "only": {"only": ["code", "bio"]},
    "exclude": {"exclude": ["code", "bio"]},
    "weights": {"weights": {"math": 0.25, "tales": 1.5}},
    "base": {"only": []},
}


@pytest.fixture
def sent(inspector: Page) -> list[dict[str, Any]]:
    """The bodies of all requests. The server gets them without steering; the base model is played by another prompt."""
    bodies: list[dict[str, Any]] = []

    def forward(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        bodies.append(dict(body))
        body.pop("gate", None)
        if body.pop("experts", None) is not None:
            body["prompt"] = "Compute 48 + 87.\n"
        route.continue_(post_data=json.dumps(body))

    inspector.route("**/generate", forward)
    return bodies


def test_settings_are_sent_as_the_contract_has_them(inspector: Page, sent: list[dict[str, Any]]) -> None:
    """In one page, one after another: none leaves anything to the next."""
    inspector.locator("#setting-a summary").click()
    inspector.fill("[name='a.gate.temperature']", "0.5")
    inspector.fill("[name='a.gate.freeze_after']", "3")
    for mode, experts in SETTINGS.items():
        inspector.select_option("[name='a.experts']", mode)
        for name in ("code", "bio") if mode in ("only", "exclude") else ():
            inspector.check(f"[name='a.chosen'][value={name}]")
        for name, weight in (("math", "0.25"), ("tales", "1.5")) if mode == "weights" else ():
            inspector.fill(f"[name='a.weight.{name}']", weight)
        run(inspector)
        assert sent[-1].get("experts") == experts
        assert sent[-1]["gate"] == {"temperature": 0.5, "freeze_after": 3}
    assert len(sent) == len(SETTINGS)


def test_comparison(inspector: Page, sent: list[dict[str, Any]]) -> None:
    """Same prompt, same sampling, same seed; only the setting differs. Where the texts part is said and marked."""
    inspector.get_by_role("button", name="Add a setting").click()
    inspector.select_option("[name='b.experts']", "base")
    run(inspector)
    first, second = sorted(sent, key=lambda body: "experts" in body)
    assert second.pop("experts") == {"only": []}
    assert first == second
    assert isinstance(first["seed"], int)
    headings = inspector.locator(".result h2").all_inner_texts()
    assert headings == ["A: X-LoRA", "B: base model"]
    ids = [[token["id"] for token in exported_json(inspector, result)["tokens"]] for result in (0, 1)]
    differing = []
    for number, own in enumerate(ids):
        tokens = inspector.locator(".result").nth(number).locator(ANSWER)
        differ = tokens.evaluate_all("tokens => tokens.map(token => token.classList.contains('differs'))")
        differing.append(differ)
        assert len(differ) == len(own)
    kept = [[id for id, is_other in zip(*one, strict=True) if not is_other] for one in zip(ids, differing, strict=True)]
    matcher = SequenceMatcher(None, *ids, autojunk=False)
    assert kept[0] == kept[1], "what is not marked is in both, in this order"
    assert len(kept[0]) >= sum(block.size for block in matcher.get_matching_blocks()), "and no token more is marked"
    assert sum(differing[0]) > 1
    shared = f"B shares {len(kept[1])} of its {len(ids[1])} tokens with A"
    expect(inspector.locator("#status")).to_contain_text(shared)
    left, right = (inspector.locator(".result").nth(index).bounding_box() for index in (0, 1))
    assert left
    assert right
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_log_likelihoods_of_a_comparison(inspector: Page, demo_server: Server) -> None:
    """After both have ended, a table: what each setting makes of each text, as the server says it of these tokens."""
    inspector.get_by_role("button", name="Add a setting").click()
    inspector.select_option("[name='b.experts']", "base")
    run(inspector)
    documents = [exported_json(inspector, result) for result in (0, 1)]
    settings: list[dict[str, Any]] = [{}, {"experts": {"only": []}}]
    for setting, document in zip(settings, documents, strict=True):
        setting["token_ids"] = [token["id"] for token in document["tokens"]]
    prompt = documents[0]["request"]["prompt"]
    status, answer = demo_server.post("/compare", {"prompt": prompt, "settings": settings})
    assert status == 200, answer
    found = inspector.locator(".likelihood td").all_inner_texts()
    means, sums = answer["log_likelihood"]["per_token"], answer["log_likelihood"]["sum"]
    cells = [(means[judge][text], sums[judge][text]) for judge in (0, 1) for text in (0, 1)]
    for shown, (mean, total) in zip(found, cells, strict=True):
        expected = [math.exp(-mean), mean, total]
        assert [float(number) for number in re.findall(r"-?[0-9.]+", shown)] == pytest.approx(expected, abs=0.06)
    assert means[0][0] > means[1][0], "X-LoRA finds its own text likelier than the base does"
    assert inspector.locator(".likelihood .best").count() == 2
    expect(inspector.locator(".likelihood th[scope=row]").first).to_have_text("A: X-LoRA")


def test_without_log_likelihoods_the_texts_stay(inspector: Page) -> None:
    """The reason is said; a single setting has no table."""
    run(inspector)
    assert inspector.locator(".likelihood").count() == 0
    body = json.dumps({"error": {"message": "the server is full", "type": "t", "param": None, "code": "overloaded"}})
    inspector.route("**/compare", lambda route: route.fulfill(status=429, body=body, content_type="application/json"))
    inspector.get_by_role("button", name="Add a setting").click()
    run(inspector)
    expect(inspector.locator("#status")).to_contain_text("No likelihoods: the server is full")
    assert inspector.locator(ANSWER).count() > 0
    assert inspector.locator(".likelihood").count() == 0


def test_rows_without_experts_are_neutral(inspector: Page) -> None:
    """The base model's rows are all zero: no expert leads, and there is no entropy."""
    event = {
        **{"id": "gen-1", "index": 0, "text": "a", "token_ids": [1], "tokens": [{"id": 1, "text": "a"}]},
        **{"finish_reason": "length", "scalings": {"experts": ["math", "bio"], "sites": ["s"], "start": 0}},
    }
    event["scalings"] |= {"mean": [[0, 0]], "entropy": [None]}
    usage = {"completion_tokens": 1, "forward_passes": 1, "drafts": {"lookahead": [], "prompt_lookup": []}}
    body = f"data: {json.dumps(event)}\n\ndata: {json.dumps({'id': 'gen-1', 'usage': usage})}\n\ndata: [DONE]\n\n"
    inspector.route("**/generate", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    run(inspector)
    expect(inspector.locator(".legend li").last).to_contain_text("no expert 100 %")
    inspector.locator(ANSWER).hover()
    expect(inspector.locator(".along")).to_be_hidden()
    expect(inspector.locator(".facts")).to_contain_text("none: no expert acts")


def test_one_expert_alone_on_the_server(inspector: Page) -> None:
    inspector.select_option("[name='a.experts']", "only")
    inspector.check("[name='a.chosen'][value=tales]")
    run(inspector)
    assert inspector.locator(ANSWER).count() > 0
    expect(inspector.locator(".legend li").last).to_contain_text("tales 100 %")
