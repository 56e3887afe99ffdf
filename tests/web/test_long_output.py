"""2,000 tokens with every site's scalings: the page stays responsive while they come, and afterwards."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.web.conftest import run

TOKENS = 2000
FRAMES = """() => {
    window.gaps = [];
    let last = performance.now();
    const next = (now) => { window.gaps.push(now - last); last = now; requestAnimationFrame(next); };
    requestAnimationFrame(next);
}"""
NEXT_FRAME = """() => {
    const begun = performance.now();
    return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - begun))));
}"""


def test_page_stays_responsive(inspector: Page) -> None:
    inspector.set_default_timeout(120_000)
    inspector.fill("[name=max_tokens]", str(TOKENS))
    inspector.locator("summary", has_text="More sampling").click()
    inspector.check("[name=ignore_eos]")
    inspector.evaluate(FRAMES)
    inspector.click("#run")
    expect(inspector.locator("#status")).not_to_have_text("Running…", timeout=120_000)
    gaps = sorted(inspector.evaluate("() => window.gaps"))
    assert inspector.locator(".token").count() == TOKENS
    print("median", gaps[len(gaps)//2], "p99", gaps[int(len(gaps) * 0.99)], "max", gaps[-1], len(gaps))
    inspector.locator(".token").last.focus()
    for key in ("Home", "End", "ArrowUp", "ArrowLeft"):
        inspector.keyboard.press(key)
        print(key, inspector.evaluate(NEXT_FRAME))
    canvas = inspector.locator(".map canvas").first.bounding_box()
    assert canvas and canvas["width"] < 1440
