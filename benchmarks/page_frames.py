"""How late the inspector page's frames are while a long answer comes, and after a key is pressed in it.

    python -m benchmarks.page_frames [--tokens-per-second 400] [--check]

An answer of 2,000 tokens with every site's scalings is played to the page, in a Chromium that is installed, at several
times the rate at which an engine makes it on two cores. The frames of a page that does nothing come first: what they
show is the machine's own noise. Times are milliseconds between two frames; a key's until the second frame after it.
With --check a missed bar is exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.common import Bar, emit, percentiles, print_row
from tests.support import long_answer
from tests.support.inspector import MISSING, browser_path, launch, new_context, open_inspector, run
from tests.support.server_process import server

P95_MS, WORST_MS, KEY_MS = 150, 1000, 300
_IDLE_MS = 2000
_KEYS = ("Home", "End", "ArrowUp", "ArrowLeft")
_WATCH = """() => {
    window.gaps = [];
    let last = performance.now();
    const next = (now) => { window.gaps.push(now - last); last = now; requestAnimationFrame(next); };
    requestAnimationFrame(next);
}"""
_TAKE = "() => window.gaps.splice(0)"
_NEXT_FRAME = """() => {
    const begun = performance.now();
    const frame = () => new Promise(requestAnimationFrame);
    return frame().then(frame).then(() => performance.now() - begun);
}"""


def frames(what: str, page: Page) -> dict[str, Any]:
    """Those since the last call."""
    gaps: list[float] = page.evaluate(_TAKE)
    row = {"what": what, "frames": len(gaps), **percentiles(gaps, (50, 95)), "worst": max(gaps)}
    print_row(row)
    return row


def keys(page: Page) -> dict[str, float]:
    """What each of some keys takes in the map of a long answer."""
    page.locator(".token").last.focus()
    found: dict[str, float] = {}
    for key in _KEYS:
        page.keyboard.press(key)
        found[key] = page.evaluate(_NEXT_FRAME)
    print_row(found)
    return found


def measure(page: Page) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Frames of an idle page and of one that shows an answer; then keys."""
    page.evaluate(_WATCH)
    page.wait_for_timeout(_IDLE_MS)
    rows = [frames("idle", page)]
    run(page)
    rows.append(frames("while tokens come", page))
    return rows, keys(page)


def bars_of(rows: list[dict[str, Any]], pressed: dict[str, float]) -> list[Bar]:
    return [
        Bar("19 of 20 frames while tokens come, ms", "<=", P95_MS, rows[-1]["p95"]),
        Bar("the latest frame while tokens come, ms", "<=", WORST_MS, rows[-1]["worst"]),
        Bar("a key in a long answer until its frame, ms", "<=", KEY_MS, max(pressed.values())),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-second", type=int, default=long_answer.TOKENS_PER_SECOND)
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    args = parser.parse_args()
    path = browser_path()
    if path is None:
        sys.exit(MISSING)
    with server("--threads", "1") as running, sync_playwright() as playwright:
        browser = launch(playwright, path)
        page = open_inspector(new_context(browser).new_page(), running)
        long_answer.prepare(page, running, args.tokens_per_second)
        rows, pressed = measure(page)
        browser.close()
    bars = bars_of(rows, pressed)
    emit({"benchmark": "page_frames", "tokens": long_answer.TOKENS, "rows": rows, "keys": pressed}, bars)
    sys.exit(1 if args.check and not all(bar.met for bar in bars) else 0)


if __name__ == "__main__":
    main()
