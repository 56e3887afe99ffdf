"""2,000 tokens with every site's scalings. How soon the page draws its frames meanwhile: benchmarks/page_frames.py."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.support import long_answer
from tests.support.inspector import ANSWER, WIDTH, exported_json, run
from tests.support.server_process import Server

IN_TEXT = """token => {
    const [box, text] = [token.getBoundingClientRect(), token.closest('.text').getBoundingClientRect()];
    return box.top >= text.top && box.bottom <= text.bottom;
}"""


def test_a_long_answer_is_shown_whole(inspector: Page, demo_server: Server) -> None:
    """A token that is pointed at in one place is marked in all, and brought into view where it is not."""
    long_answer.prepare(inspector, demo_server)
    run(inspector)
    assert inspector.locator(ANSWER).count() == long_answer.TOKENS
    assert len(exported_json(inspector)["scalings"]["full"]) == long_answer.TOKENS
    canvas = inspector.locator(".along canvas").bounding_box()
    assert canvas
    assert canvas["width"] < WIDTH, "only what is in view is drawn"

    inspector.uncheck("#show-prompt")
    for map in (".along", ".layers"):
        scroller = inspector.locator(f"{map} .scroller")
        scroller.evaluate("scroller => { scroller.scrollLeft = 4000; }")
        scroller.hover(position={"x": 42, "y": 60})  # columns are four pixels wide
        token = inspector.locator(".token.active")
        expect(inspector.locator(".detail h3")).to_contain_text("Token 1010 ")
        assert token.evaluate(IN_TEXT)
        for other in (".along .scroller", ".layers .scroller"):
            expect(inspector.locator(other)).to_have_attribute("data-marked", "1010")
    inspector.locator(".text").evaluate("text => { text.scrollTop = 0; }")
    inspector.locator(ANSWER).nth(7).hover()
    for map in (".along", ".layers"):
        scroller = inspector.locator(f"{map} .scroller")
        expect(scroller).to_have_attribute("data-marked", "7")
        assert scroller.evaluate("scroller => scroller.scrollLeft") <= 7 * 4
