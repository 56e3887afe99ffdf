"""What the colours stand for, in the text and in the map of layers: against the numbers that the page exports."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.support.inspector import SWITCHING_PROMPT, exported_json
from tests.support.server_process import Server

STRENGTHS = "tokens => tokens.map(token => parseFloat(token.style.getPropertyValue('--strength')))"
MATH, BIO = (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)


@pytest.fixture
def looked(written: Page) -> Iterator[Page]:
    """The page with an answer; the looks are as at first again for the next test."""
    yield written
    written.select_option("#colour", "lead")
    written.select_option("#group", "layer")
    written.check("#show-prompt")


def pixels(page: Page, canvas: str) -> np.ndarray[Any, Any]:
    """What is drawn now, RGBA."""
    page.evaluate("() => new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))")
    drawn = page.locator(canvas).evaluate("canvas => canvas.toDataURL('image/png').split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn))).convert("RGBA")).astype(int)


def test_the_prompt_has_the_rows_of_the_positions_that_produce_it(looked: Page, demo_server: Server) -> None:
    """Each of its tokens but the first; they are what POST /scalings says of the positions before."""
    prompt = exported_json(looked)["prompt"]
    _, alone = demo_server.post("/scalings", {"prompt": SWITCHING_PROMPT})
    assert [token["id"] for token in prompt["tokens"]] == [token["id"] for token in alone["tokens"]]
    assert prompt["scalings"]["mean"][0] is None
    assert np.allclose(prompt["scalings"]["mean"][1:], alone["scalings"]["mean"][:-1], atol=1e-4)
    expect(looked.locator(".token.prompt")).to_have_count(len(prompt["tokens"]))
    looked.uncheck("#show-prompt")
    expect(looked.locator(".token.prompt").first).to_be_hidden()
    looked.locator(".token.prompt + .token:not(.prompt)").focus()
    looked.keyboard.press("Home")
    expect(looked.locator(".detail h3")).to_contain_text("Token 0 ")


def test_colours_stand_for_what_is_chosen(looked: Page) -> None:
    """Strength is the number's share of its largest, half of it in the prompt."""
    document = exported_json(looked)
    prompt, answer = document["prompt"], document
    mean = np.array([[0.0] * 4, *prompt["scalings"]["mean"][1:], *answer["scalings"]["mean"]])
    entropy = np.array([0.0, *prompt["scalings"]["entropy"][1:], *answer["scalings"]["entropy"]]) / np.log(4)
    surprisal = np.array([0.0] * len(prompt["tokens"]) + [-token["logprob"] for token in answer["tokens"]]) / 6
    dimmed = np.array([0.5] * len(prompt["tokens"]) + [1.0] * len(answer["tokens"]))
    for by, share in (("expert:2", mean[:, 2]), ("entropy", entropy), ("surprisal", surprisal)):
        looked.select_option("#colour", by)
        shown = looked.locator(".token").evaluate_all(STRENGTHS)
        assert np.allclose(shown, 45 * dimmed * np.clip(share, 0, 1), atol=0.01), by
        expect(looked.locator(".scale")).to_be_visible()
    looked.get_by_role("button", name="math").click()
    expect(looked.locator("#colour")).to_have_value("expert:0")
    expect(looked.get_by_role("button", name="math")).to_have_attribute("aria-pressed", "true")
    assert np.allclose(looked.locator(".token").evaluate_all(STRENGTHS), 45 * dimmed * mean[:, 0], atol=0.01)


@pytest.mark.parametrize(("group", "rows"), [("layer", 4), ("module", 7)])
def test_the_map_of_layers(looked: Page, group: str, rows: int) -> None:
    """A cell is the mean of its sites: the leader's share in the leader's colour, or the chosen expert's weight."""
    looked.uncheck("#show-prompt")
    looked.select_option("#group", group)
    document = exported_json(looked)
    sites = document["scalings"]["sites"]
    keys = [site.split(".")[2] if group == "layer" else site.rsplit(".", 1)[1] for site in sites]
    full = np.array(document["scalings"]["full"])
    names = list(dict.fromkeys(keys))
    grouped = np.stack([full[:, [key == name for key in keys]].mean(axis=1) for name in names], axis=1)
    assert grouped.shape[1] == rows
    shown = looked.locator(".layers .names li").all_inner_texts()
    assert shown == [f"layer {name}" if group == "layer" else name for name in names]
    width = looked.locator(".layers canvas").bounding_box()
    assert width
    cell = min(18, width["width"] / len(full))
    token, row = 34, rows - 1
    drawn = pixels(looked, ".layers canvas")[20 * row + 8, int((token + 0.4) * cell)]
    assert np.allclose(drawn[:3], BIO, atol=2)
    assert abs(drawn[3] / 255 - grouped[token, row].max()) < 0.02
    looked.select_option("#colour", "expert:0")
    for token in (5, 17, 34):
        drawn = pixels(looked, ".layers canvas")[20 * row + 8, int((token + 0.4) * cell)]
        assert abs(drawn[3] / 255 - grouped[token, row, 0]) < 0.02
    looked.locator(".layers canvas").hover(position={"x": 5.4 * cell, "y": 28})
    expect(looked.locator(".layers .readout")).to_have_text(
        f"token 5, {shown[1]}: "
        + ", ".join(
            f"{name} {weight:.3f}" for name, weight in zip(document["scalings"]["experts"], grouped[5, 1], strict=True)
        )
    )
    expect(looked.locator(".token.active")).to_have_text(document["tokens"][5]["text"])


def test_surprisal_of_a_given_text(inspector: Page, demo_server: Server) -> None:
    """With the perplexities of X-LoRA, of the base and of each expert alone in a table."""
    inspector.get_by_role("tab", name="Scalings").click()
    inspector.fill("[name=text]", SWITCHING_PROMPT)
    inspector.check("[name=perplexity]")
    inspector.click("#run")
    _, answer = demo_server.post("/scalings", {"prompt": SWITCHING_PROMPT, "perplexity": True})
    found = answer["perplexity"]
    expected = [found["xlora"], found["base"], *found["experts"].values()]
    table = inspector.get_by_role("region", name="Perplexity")
    expect(table.locator("td")).to_have_text([f"{one['perplexity']:.2f}" for one in expected])
    inspector.select_option("#colour", "surprisal")
    shown = inspector.locator(".token").evaluate_all(STRENGTHS)
    logprobs = [0.0, *found["xlora"]["logprobs"][1:]]
    assert np.allclose(shown, 45 * np.clip(-np.array(logprobs) / 6, 0, 1), atol=0.05)
