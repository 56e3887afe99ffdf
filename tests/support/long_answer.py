"""A long answer with every site's scalings, played to the inspector page at a steady rate without an engine."""

from __future__ import annotations

import json
from urllib.request import Request, urlopen

from playwright.sync_api import Page

from tests.support.server_process import Server

TOKENS = 2000
TOKENS_PER_SECOND = 400  # several times what the demo's engine makes on two cores

# Plays the answer to /generate from prepared events, as a browser hands on a response.
_PLAYER = """([events, perSecond]) => {
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


def prepare(page: Page, running: Server, per_second: int = TOKENS_PER_SECOND) -> None:
    """The next answer that the page asks for is TOKENS long, and comes at this rate."""
    page.evaluate(_PLAYER, [_events(running), per_second])


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
