"""2,000 tokens with every site's scalings: the page stays responsive while they come, and afterwards."""

from __future__ import annotations

import json
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Page

from tests.support.server_process import Server
from tests.web.conftest import exported_json, run

TOKENS = 2000
TOKENS_PER_SECOND = 400  # several times what the demo's engine makes on two cores

# Plays the answer to /generate from prepared events at a steady rate, as a browser hands on a response.
PLAYER = """([events, perSecond]) => {
    const fetched = window.fetch;
    const encoder = new TextEncoder();
    window.fetch = (path, init) => {
        if (path !== "generate") return fetched(path, init);
        let sent = 0;
        const body = new ReadableStream({
            start(controller) {
                const started = performance.now();
                const timer = setInterval(() => {
                    const due = Math.min(events.length, Math.ceil((performance.now() - started) / 1000 * perSecond));
                    if (due > sent) controller.enqueue(encoder.encode(events.slice(sent, due).join("")));
                    sent = due;
                    if (sent < events.length) return;
                    clearInterval(timer);
                    controller.close();
                }, 5);
            },
        });
        return Promise.resolve(new Response(body));
    };
}"""
FRAMES = """() => {
    window.gaps = [];
    let last = performance.now();
    const next = (now) => { window.gaps.push(now - last); last = now; requestAnimationFrame(next); };
    requestAnimationFrame(next);
}"""
NEXT_FRAME = """() => {
    const begun = performance.now();
    const frame = () => new Promise(requestAnimationFrame);
    return frame().then(frame).then(() => performance.now() - begun);
}"""


def _events(running: Server) -> list[str]:
    """The server's own events for 40 tokens, repeated."""
    body = {"prompt": "Tell", "max_tokens": 40, "ignore_eos": True, "logprobs": 5, "return_scalings": "full"}
    url = f"http://127.0.0.1:{running.port}/generate"
    data = json.dumps(body | {"stream": True}).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=60) as answer:
        text = answer.read().decode()
    first, *more, usage, _ = text.removesuffix("\n\n").split("\n\n")
    tokens = [first, *(more[index % len(more)] for index in range(TOKENS - 1))]
    assert "experts" in json.loads(first.removeprefix("data: "))["scalings"]
    return [f"{event}\n\n" for event in (*tokens, usage, "data: [DONE]")]


def test_a_long_answer_is_shown_whole(inspector: Page, demo_server: Server) -> None:
    inspector.evaluate(PLAYER, [_events(demo_server), TOKENS_PER_SECOND])
    run(inspector)
    assert inspector.locator(".token").count() == TOKENS
    assert len(exported_json(inspector)["scalings"]["full"]) == TOKENS
    canvas = inspector.locator(".map canvas").first.bounding_box()
    assert canvas
    assert canvas["width"] < 1440, "only what is in view is drawn"


@pytest.mark.slow  # its times are those of a machine that does nothing else
def test_page_stays_responsive(inspector: Page, demo_server: Server) -> None:
    inspector.evaluate(PLAYER, [_events(demo_server), TOKENS_PER_SECOND])
    inspector.evaluate(FRAMES)
    run(inspector)
    gaps = sorted(inspector.evaluate("() => window.gaps"))
    assert gaps[int(0.95 * len(gaps))] < 150, "frames were late while tokens came"
    assert gaps[-1] < 1000
    inspector.locator(".token").last.focus()
    for key in ("Home", "End", "ArrowUp", "ArrowLeft"):
        inspector.keyboard.press(key)
        took = inspector.evaluate(NEXT_FRAME)
        assert took < 300, f"{key} took {took:.0f} ms"
