"""2,000 tokens with every site's scalings. How soon the page draws its frames meanwhile: benchmarks/page_frames.py."""

from __future__ import annotations

from playwright.sync_api import Page

from tests.support import long_answer
from tests.support.inspector import ANSWER, WIDTH, exported_json, run
from tests.support.server_process import Server


def test_a_long_answer_is_shown_whole(inspector: Page, demo_server: Server) -> None:
    long_answer.prepare(inspector, demo_server)
    run(inspector)
    assert inspector.locator(ANSWER).count() == long_answer.TOKENS
    assert len(exported_json(inspector)["scalings"]["full"]) == long_answer.TOKENS
    canvas = inspector.locator(".along canvas").bounding_box()
    assert canvas
    assert canvas["width"] < WIDTH, "only what is in view is drawn"
