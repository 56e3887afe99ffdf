"""/docs and /redoc in a browser that reaches no other host, with and without a key."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.support.inspector import close
from tests.support.server_process import Server

REFUSED = {"message": "a valid key is needed", "type": "authentication_error", "param": None, "code": "invalid_api_key"}


@pytest.fixture
def local(context: BrowserContext, demo_server: Server) -> Iterator[Page]:
    """A tab that may ask this server alone; an error of a script is a failure."""
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    yield page
    close(page)
    assert problems == []
    own = re.compile(rf"http://127\.0\.0\.1:{demo_server.port}/|blob:|data:")
    others = [url for url in asked if not own.match(url)]
    assert [url for url in others if "/redoc/logo" not in url] == [], "Redoc's own logo is refused by our policy"


def test_docs_ask_for_the_key_and_send_it(local: Page, demo_server: Server) -> None:
    """The page is open, its document is not; a request that is tried has the key, and its answer is shown."""
    heard: list[str | None] = []

    def guard(route: Route) -> None:
        heard.append(route.request.headers.get("authorization"))
        if heard[-1] == "Bearer correct-horse":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": REFUSED})

    for path in ("openapi.json", "tokenize"):
        local.route(f"**/{path}", guard)
    local.goto(f"http://127.0.0.1:{demo_server.port}/docs")
    dialog = local.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("The server asks for a key.")
    dialog.get_by_label("Key").fill("correct-horse")
    local.keyboard.press("Enter")
    operation = local.locator("#operations-tokenizer-tokenize_tokenize_post")
    operation.locator("button").first.click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    expect(operation.locator(".live-responses-table")).to_contain_text("token_ids")
    assert heard[0] is None
    assert heard[1] == "Bearer correct-horse"
    assert local.evaluate("() => document.styleSheets.length") == 2


def test_redoc_shows_every_route(local: Page, demo_server: Server) -> None:
    local.goto(f"http://127.0.0.1:{demo_server.port}/redoc")
    expect(local.get_by_role("heading", name="Generate text, and see which experts wrote it")).to_be_visible()
    expect(local.get_by_role("heading", name="Text to token ids")).to_be_attached()
    local.get_by_placeholder("Search...").fill("detokenize")
    expect(local.locator("[role=menuitem]").first).to_be_visible()
