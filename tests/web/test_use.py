"""The page under a hand: what stays in view, what says what it means, what can be hit, told apart and found again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.support.inspector import ANSWER, close, open_inspector, run
from tests.support.server_process import Server

SMALL_TARGETS = """() => [...document.querySelectorAll(
    'button, a[href], select, textarea, summary, input, .scroller, [tabindex="0"]:not(.token)')]
    .map(element => [element, (element.closest('label.check') ?? element).getBoundingClientRect()])
    .filter(([element, box]) => box.width > 0 && !element.matches('.skip') && (box.width < 24 || box.height < 24))
    .map(([element]) => element.outerHTML.slice(0, 90))"""
LONG_NAMES = [f"example-lab-mixture-expert-for-{field}-v{version}" for field in
              ("organic-chemistry", "inorganic-chemistry", "materials") for version in range(1, 5)]  # fmt: skip


def open_sized(context: BrowserContext, running: Server, width: int, height: int) -> Page:
    """The page in a window of this size."""
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": height})
    return open_inspector(page, running)


@pytest.mark.parametrize(("width", "height"), [(1280, 650), (390, 844), pytest.param(640, 400, marks=pytest.mark.slow)])
def test_small_windows(context: BrowserContext, demo_server: Server, width: int, height: int) -> None:
    """A laptop, a phone, and a window at 200 %: with all options open the main button is in view, a token that is
    clicked stays in view, arrows go on from it, every target has 24 pixels, and nothing scrolls sideways.
    """
    page = open_sized(context, demo_server, width, height)
    for more in page.locator("#form summary").all():
        more.click()
    page.get_by_role("button", name="Add a setting").click()
    expect(page.locator("#run")).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="Remove setting B").click()
    run(page)
    token = page.locator(ANSWER).nth(20)
    token.click()
    expect(page.locator(".sites")).to_be_visible()
    expect(token).to_be_in_viewport(ratio=1)
    expect(token).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator(ANSWER).nth(21)).to_be_focused()
    expect(page.locator(ANSWER).nth(21)).to_be_in_viewport(ratio=1)
    page.locator("#history summary").click()
    assert page.evaluate(SMALL_TARGETS) == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    close(page)


def test_figures_say_what_they_mean(written: Page) -> None:
    """Under the pointer and under the focus; Escape takes it away."""
    tip = written.get_by_role("tooltip")
    written.locator("#live .figure", has_text="lookahead hits").hover()
    expect(tip).to_contain_text("tokens that the scaling pass guesses ahead, that came true")
    figure = written.locator(".summary .figure", has_text="entropy")
    figure.focus()
    expect(tip).to_contain_text("the mean of the entropies of all sites at all tokens, as a share of ln 4 = 1.39 nats")
    expect(figure).to_have_accessible_description(tip.inner_text())
    written.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    for one in written.locator(".figure").all():
        assert (one.get_attribute("data-tip") or "").endswith(".")
    assert written.locator("[data-live=forward]").inner_text() in written.locator(".summary").inner_text()


def test_an_empty_page_invites(inspector: Page, demo_server: Server) -> None:
    """With examples of the bundle, which are in a menu too; no chart is shown before there is something in it."""
    examples = json.loads(demo_server.get("/examples")[1])
    menu = inspector.locator("#examples option").all_inner_texts()
    assert menu[1:] == [example["prompt"].strip()[:60] for example in examples]
    inspector.select_option("#examples", "3")
    expect(inspector.locator("[name=prompt]")).to_have_value(examples[3]["prompt"])
    assert inspector.locator("figure:visible").count() == 0
    invited = inspector.get_by_role("group", name="Examples to run").get_by_role("button")
    expect(invited).to_have_count(4)
    invited.first.click()
    expect(inspector.locator("#status")).to_contain_text("tokens.")
    expect(inspector.locator("[name=prompt]")).to_have_value(examples[0]["prompt"])
    expect(inspector.locator("#invitation")).to_be_hidden()


def test_a_failed_run_shows_no_empty_charts(inspector: Page) -> None:
    inspector.route("**/generate", lambda route: route.abort())
    run(inspector)
    expect(inspector.get_by_role("alert")).to_be_visible()
    assert inspector.locator("figure:visible, .legend:visible, .detail:visible").count() == 0


def test_eight_settings(inspector: Page) -> None:
    """No ninth; one table of all. The streams share the browser's few connections with the rest of the page."""
    add = inspector.locator("#add-setting")
    for letter, mode in zip("bcdefgh", ("base", "only", "exclude", "weights", "", "", ""), strict=True):
        add.click()
        inspector.select_option(f"[name='{letter}.experts']", mode)
    expect(add).to_be_hidden()
    inspector.check("[name='c.chosen'][value=bio]")
    inspector.fill("[name='e.weight.math']", "1")
    inspector.fill("[name=max_tokens]", "4")
    run(inspector)
    expect(inspector.locator(".result")).to_have_count(8)
    expect(inspector.locator(".likelihood td")).to_have_count(64)
    heads = inspector.locator(".likelihood th[scope=row]").all_inner_texts()
    assert [head[:2] for head in heads] == [f"{letter}:" for letter in "ABCDEFGH"]
    inspector.get_by_role("button", name="Remove setting D").click()
    expect(add).to_be_visible()
    assert inspector.locator(".setting legend").all_inner_texts() == [f"Setting {letter}" for letter in "ABCEFGH"]


def test_history(inspector: Page, demo_server: Server) -> None:
    """A run can be seen again; two are compared, with the table where their prompt is the same."""
    inspector.fill("[name=max_tokens]", "12")
    run(inspector)
    first = inspector.locator(ANSWER).all_text_contents()
    inspector.select_option("[name='a.experts']", "base")
    run(inspector)
    second = inspector.locator(ANSWER).all_text_contents()
    inspector.fill("[name=prompt]", "Compute 48 + 87.\n")
    run(inspector)
    history = inspector.locator("#history")
    expect(history.locator("summary")).to_have_text("History (3)")
    history.locator("summary").click()
    history.locator("button.past").last.click()
    expect(inspector.locator(".result h2")).to_have_text("X-LoRA")
    assert inspector.locator(ANSWER).all_text_contents() == first
    expect(inspector.locator(".summary")).to_contain_text("12 tokens")
    boxes = history.get_by_role("checkbox")
    boxes.nth(0).check()
    boxes.nth(2).check()
    boxes.nth(1).check()
    expect(boxes.nth(0)).not_to_be_checked()
    history.get_by_role("button", name="Compare the two").click()
    expect(inspector.locator("#run")).to_be_enabled()
    assert inspector.locator(".result h2").all_inner_texts() == ["A: X-LoRA", "B: base model"]
    assert inspector.locator(ANSWER).all_text_contents() == first + second
    expect(inspector.locator(".likelihood td")).to_have_count(4)
    boxes.nth(0).check()
    history.get_by_role("button", name="Compare the two").click()
    expect(inspector.locator("#status")).to_contain_text("No likelihoods: the prompts differ.")
    expect(inspector.locator(".likelihood")).to_have_count(0)


def test_copying_without_the_clipboard_of_secure_pages(inspector: Page) -> None:
    """As over plain http: no dialog opens, and the text is copied."""
    refuse = "() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')); }"
    inspector.evaluate(refuse)
    inspector.get_by_role("button", name="Copy link").click()
    expect(inspector.locator("#status")).to_have_text("Link copied.")
    assert inspector.evaluate("() => navigator.clipboard.readText()").startswith("http://127.0.0.1:")
    expect(inspector.get_by_role("dialog")).to_have_count(0)


def test_twelve_experts_with_long_names(inspector: Page) -> None:
    """Each label is whole and no other's; colour and line together are no other's either."""

    def answer(route: Route) -> None:
        event: dict[str, Any] = {"index": 0, "text": "a", "tokens": [{"id": 1, "text": "a"}], "finish_reason": "length"}
        weights = [[float(expert == column) for expert in range(12)] for column in range(12)]
        event["tokens"] = [{"id": id, "text": f" t{id}"} for id in range(12)]
        event["scalings"] = {"experts": LONG_NAMES, "sites": ["s.0.q"], "start": 0, "mean": weights}
        event["scalings"]["entropy"] = [0] * 12
        usage = {"completion_tokens": 12, "forward_passes": 12, "drafts": {"lookahead": [], "prompt_lookup": []}}
        written = "".join(f"data: {json.dumps(one)}\n\n" for one in (event, {"usage": usage, "seed": 1}))
        route.fulfill(body=written, content_type="text/event-stream")

    inspector.route("**/generate", answer)
    run(inspector)
    bars = ".bars[aria-label='Weights of the experts'] .name"
    for place in (".legend .expert", ".along .names li:not(:first-child)", bars):
        labels = inspector.locator(place)
        texts = labels.all_inner_texts()
        assert len(set(texts)) == 12, place
        assert labels.evaluate_all("all => all.filter(one => one.scrollWidth > one.clientWidth).length") == 0, place
    look = "all => all.map(({style}) => style.getPropertyValue('--colour') + style.borderBottomStyle)"
    assert len(set(inspector.locator(ANSWER).evaluate_all(look))) == 12
    inspector.locator(".along .names li").nth(9).hover()
    expect(inspector.get_by_role("tooltip")).to_have_text(LONG_NAMES[8])
