"""What the page shows of a run, from the page's own data and from the server's."""

from __future__ import annotations

import base64
import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.support.inspector import (
    ANSWER,
    SWITCHING_PROMPT,
    copied,
    exported,
    exported_json,
    leaders,
    open_inspector,
    run,
)
from tests.support.server_process import Server

SWITCHING = {"prompt": SWITCHING_PROMPT, "temperature": 0, "logprobs": 5, "return_scalings": "full"}
LEGEND_COLOURS = """items => Object.fromEntries(items.map(item => [
    item.querySelector('.expert').textContent, item.querySelector('.swatch').style.getPropertyValue('--colour')]))"""
TOKEN_COLOURS = "tokens => tokens.map(token => token.style.getPropertyValue('--colour'))"


def shares_of(page: Page) -> dict[str, int]:
    """The legend: percent of the tokens that each expert leads."""
    names = page.locator(".legend .expert").all_inner_texts()
    shares = page.locator(".legend strong").all_inner_texts()
    return {name: int(share.removesuffix(" %")) for name, share in zip(names, shares, strict=True)}


def test_tokens_and_scalings_are_the_servers(written: Page, demo_server: Server) -> None:
    document = exported_json(written)
    _, answer = demo_server.post("/generate", SWITCHING | {"seed": document["request"]["seed"]})
    output = answer["outputs"][0]
    assert [token["id"] for token in document["tokens"]] == output["token_ids"]
    assert "".join(written.locator(ANSWER).all_text_contents()).removesuffix("</s>") == output["text"]
    assert document["scalings"]["experts"] == output["scalings"]["experts"]
    assert np.allclose(document["scalings"]["mean"], output["scalings"]["mean"], atol=1e-4)
    full = np.load(io.BytesIO(base64.b64decode(output["scalings"]["full"])))
    assert np.allclose(document["scalings"]["full"], full, atol=1e-4)
    assert document["answer"]["usage"]["completion_tokens"] == len(output["token_ids"])


def test_colours_change_where_the_domain_does(written: Page) -> None:
    document = exported_json(written)
    texts = [token["text"] for token in document["tokens"]]
    line_break = texts.index("\n")
    expected = ["math"] * (line_break + 1) + ["bio"] * (len(texts) - line_break - 1)
    assert leaders(document) == expected
    colours = written.locator(".legend li").evaluate_all(LEGEND_COLOURS)
    assert len(set(colours.values())) == len(colours) == 4
    assert written.locator(ANSWER).evaluate_all(TOKEN_COLOURS) == [colours[name] for name in expected]


def test_legend_has_the_shares(written: Page) -> None:
    led = leaders(exported_json(written))
    shares = shares_of(written)
    assert list(shares) == ["math", "code", "bio", "tales"]
    assert all(abs(share - 100 * led.count(name) / len(led)) <= 0.5 for name, share in shares.items())


def test_pointing_at_a_token_shows_its_weights(written: Page) -> None:
    document = exported_json(written)
    written.locator(ANSWER).nth(2).hover()
    detail = written.locator(".detail")
    expect(detail.locator("h3")).to_have_text(f"Token 2 {json.dumps(document['tokens'][2]['text'])}")
    bars = detail.get_by_role("list", name="Weights of the experts").locator(".number").all_inner_texts()
    assert np.allclose([float(bar) for bar in bars], document["scalings"]["mean"][2], atol=6e-4)
    facts = detail.locator("dd").all_inner_texts()
    assert abs(float(facts[0].split()[0]) - document["scalings"]["entropy"][2]) < 6e-4
    assert abs(float(facts[1].split()[0]) - document["tokens"][2]["logprob"]) < 6e-4
    names = detail.get_by_role("list", name="Most likely tokens").locator(".name").all_inner_texts()
    assert names == [json.dumps(one["text"]) for one in document["tokens"][2]["top_logprobs"]]


def test_keyboard_alone(inspector: Page) -> None:
    """From the prompt to a site of a token and back, without a pointer."""
    inspector.locator("[name=prompt]").focus()
    inspector.keyboard.press("Control+Enter")
    expect(inspector.locator("#status")).to_contain_text("tokens.")
    tokens = inspector.locator(ANSWER)
    assert inspector.locator(".token[tabindex='0']").count() == 1, "one stop on the way of the Tab key"
    inspector.locator("#show-prompt").focus()
    inspector.keyboard.press("Space")
    inspector.locator(".token[tabindex='0']").focus()
    for key, index in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0)):
        inspector.keyboard.press(key)
        expect(tokens.nth(index)).to_be_focused()
    inspector.keyboard.press("ArrowDown")
    first_line = tokens.nth(0).bounding_box()
    second_line = inspector.locator(".token:focus").bounding_box()
    assert first_line
    assert second_line
    assert second_line["y"] > first_line["y"]
    inspector.keyboard.press("End")
    last = tokens.count() - 1
    expect(tokens.nth(last)).to_be_focused()
    expect(inspector.locator(".detail h3")).to_contain_text(f"Token {last} ")
    inspector.keyboard.press("Enter")
    expect(inspector.locator(".sites figcaption")).to_contain_text(f"Sites of token {last} ")
    expect(tokens.nth(last)).to_be_focused()
    inspector.locator(".sites .scroller").focus()
    inspector.keyboard.press("ArrowRight")
    expect(inspector.locator(".sites .readout")).to_contain_text("model.layers.0.self_attn.k_proj: ")
    inspector.keyboard.press("Escape")
    expect(tokens.nth(last)).to_be_focused()


def test_click_shows_the_sites(written: Page) -> None:
    document = exported_json(written)
    written.locator(ANSWER).nth(34).click()
    readout = written.locator(".sites .readout").inner_text()
    site, weights = readout.split(": ", 1)
    assert site == document["scalings"]["sites"][0]
    shown = dict(pair.split() for pair in weights.split(", "))
    expected = dict(zip(document["scalings"]["experts"], document["scalings"]["full"][34][0], strict=True))
    assert shown == {name: f"{weight:.3f}" for name, weight in expected.items()}


def test_heat_map_has_the_weights(written: Page) -> None:
    """The row of the leader is opaque in its colour, and the column under the pointer is the token it stands for."""
    document = exported_json(written)
    canvas = written.locator(".along canvas")
    written.locator(ANSWER).first.hover()  # the page scrolls there now, and not below
    drawn = canvas.evaluate("canvas => canvas.toDataURL('image/png').split(',')[1]")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn))).convert("RGBA")).astype(int)
    box = canvas.bounding_box()
    assert box is not None
    prompt = len(document["prompt"]["tokens"])
    cell = min(18, box["width"] / (prompt + len(document["tokens"])))
    for token, row in ((5, 0), (40, 2)):  # math, bio
        *colour, alpha = pixels[54 + 20 * row + 8, int((prompt + token + 0.4) * cell)]
        assert abs(alpha / 255 - document["scalings"]["mean"][token][row]) < 0.02
        assert np.allclose(colour, {0: (0x00, 0x72, 0xB2), 2: (0x00, 0x9E, 0x73)}[row], atol=2)
    written.mouse.move(box["x"] + (prompt + 40.4) * cell, box["y"] + 70)
    expect(written.locator(".detail h3")).to_contain_text("Token 40 ")
    for token in (0, 33, 53):
        written.locator(ANSWER).nth(token).hover()
        expect(written.locator(".detail h3")).to_contain_text(f"Token {token} ")
        assert canvas.bounding_box() == box, "the map moves away from under the pointer"


def test_csv(written: Page) -> None:
    document = exported_json(written)
    whole = list(csv.DictReader(io.StringIO(exported(written, "csv").read_bytes().decode())))
    before, after = len(document["prompt"]["tokens"]), len(document["tokens"])
    assert [int(row["index"]) for row in whole] == list(range(-before, after))
    assert whole[0]["leader"] == whole[0]["bio"] == "", "nothing came before the first token"
    rows = [row for row in whole if int(row["index"]) >= 0]
    assert [row["text"] for row in rows] == [token["text"] for token in document["tokens"]]
    assert [row["leader"] for row in rows] == leaders(document)
    assert np.allclose([float(row["bio"]) for row in rows], np.array(document["scalings"]["mean"])[:, 2])
    assert np.allclose([float(row["entropy_nats"]) for row in rows], document["scalings"]["entropy"])


def test_png(written: Page) -> None:
    """The picture holds every token's column: blue to the line break, green after it."""
    tokens = len(exported_json(written)["tokens"])
    written.uncheck("#show-prompt")
    picture = np.asarray(Image.open(exported(written, "png")).convert("RGB")).astype(int)
    blue = np.abs(picture - (0x00, 0x72, 0xB2)).sum(axis=2) < 12
    green = np.abs(picture - (0x00, 0x9E, 0x73)).sum(axis=2) < 12
    assert picture.shape[1] >= 2 * 12 * tokens
    maps = slice(2 * 100, None)  # under title, legend and curve
    written.check("#show-prompt")
    assert blue[maps].any(axis=0).nonzero()[0].max() < green[maps].any(axis=0).nonzero()[0].min()


def test_a_link_carries_the_settings(inspector: Page, demo_server: Server) -> None:
    inspector.fill("[name=prompt]", "Compute 12 & 30 = 50 %?\n# naïve 🙂")
    inspector.fill("[name=max_tokens]", "7")
    inspector.fill("[name=temperature]", "")
    inspector.locator("summary", has_text="More sampling").click()
    inspector.fill("[name=stop]", "END\nSTOP")
    inspector.get_by_role("button", name="Add a setting").click()
    inspector.select_option("[name='b.experts']", "exclude")
    inspector.check("[name='b.chosen'][value=bio]")
    link = copied(inspector, "Copy link")
    values = "form => [...new FormData(form)]"
    before = inspector.locator("#form").evaluate(values)
    inspector.goto("about:blank")
    open_inspector(inspector, demo_server, link[link.index("#") :])
    assert inspector.locator("#form").evaluate(values) == before
    expect(inspector.locator("[name='b.chosen'][value=bio]")).to_be_visible()
    assert inspector.locator(ANSWER).count() == 0, "a link does not run by itself"


@pytest.mark.parametrize("name", ["curl", pytest.param("Python", marks=pytest.mark.slow)])
def test_copied_request_gives_the_same_text(inspector: Page, name: str) -> None:
    """Also with quotes in the prompt."""
    inspector.fill("[name=prompt]", "Say 'it''s \"5 + 5\"' \\ and $HOME.\n")
    inspector.fill("[name=seed]", "5")
    inspector.locator("summary", has_text="More sampling").click()
    inspector.fill("[name=stop]", "'")
    inspector.check("[name=ignore_eos]")
    run(inspector)
    snippet = copied(inspector, f"Copy as {name}")
    command = ["bash", "-c", snippet] if name == "curl" else [sys.executable, "-c", snippet]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    output = answer["outputs"][0]
    assert output["token_ids"] == [token["id"] for token in exported_json(inspector)["tokens"]]
    assert len(output["token_ids"]) > 1


def test_scalings_of_a_text(inspector: Page, demo_server: Server) -> None:
    """Nothing is generated; the colours follow the text's own domains."""
    text = "Compute 48 + 87.\nOnes: 8+7=15, carry 1.\ndef last_17(lines: list) -> list:\n    result = lines[-17:]\n"
    inspector.get_by_role("tab", name="Scalings").click()
    inspector.fill("[name=text]", text)
    run(inspector, "Show scalings")
    _, answer = demo_server.post("/scalings", {"prompt": text})
    document = exported_json(inspector)
    assert document["tokens"] == answer["tokens"]
    assert np.allclose(document["scalings"]["mean"], answer["scalings"]["mean"], atol=1e-4)
    shares = shares_of(inspector)
    assert all(abs(shares[name] - 100 * share) <= 0.5 for name, share in answer["top1"].items())
    assert shares["math"] > 20 < shares["code"]


def test_live_strip(inspector: Page, demo_server: Server) -> None:
    """Running requests and the rate come from /metrics; the page needs some seconds to have seen two samples."""
    inspector.fill("[name=max_tokens]", "8000")
    inspector.locator("summary", has_text="More sampling").click()
    inspector.check("[name=ignore_eos]")
    inspector.click("#run")
    expect(inspector.locator("[data-live=running]")).to_have_text("1")
    expect(inspector.locator("[data-live=hits]")).to_contain_text("%")
    expect(inspector.locator("[data-live=rate]")).not_to_have_text("0")
    inspector.click("#stop")


def test_theme_is_kept(inspector: Page) -> None:
    background = "() => getComputedStyle(document.body).backgroundColor"
    light = inspector.evaluate(background)
    inspector.get_by_role("button", name="Dark theme").click()
    dark = inspector.evaluate(background)
    inspector.reload()
    assert inspector.evaluate(background) == dark != light
