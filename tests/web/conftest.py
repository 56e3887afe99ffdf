"""The inspector page in a headless Chromium, before the real server on the demo bundle.

The browser is not Playwright's own download but one that is installed; without one these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.server_process import Server, server

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# As root there is no sandbox; the others keep the browser from calling its maker's hosts.
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SECONDS = 20
SWITCHING_PROMPT = "What is 88 + 76? Which strand pairs with CTA TCT TAT?\n"


expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    with server("--threads", "1") as running:
        yield running


@pytest.fixture(scope="module")  # not session: while it runs, asyncio.run() is not possible in other tests
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, demo_server: Server) -> Iterator[Page]:
    """An empty tab. The test fails on an error of a script or of the content security policy."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    context.set_default_timeout(SECONDS * 1000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if "Failed to load resource" not in said.text else None)
    yield page
    context.close()
    assert problems == []


@pytest.fixture
def inspector(page: Page, demo_server: Server) -> Page:
    """The page, ready for input."""
    return open_inspector(page, demo_server)


def copied(page: Page, button: str) -> str:
    """What a copy button shows; closes the dialog."""
    page.get_by_role("button", name=button).click()
    text = page.locator("#snippet-text").input_value()
    page.keyboard.press("Escape")
    expect(page.locator("#snippet-dialog")).to_be_hidden()
    return text


def open_inspector(page: Page, running: Server, fragment: str = "") -> Page:
    page.goto(f"http://127.0.0.1:{running.port}/{fragment}")
    expect(page.locator("#form:not([inert])")).to_be_visible()
    return page


def run(page: Page, button: str = "Generate") -> None:
    """Presses the button, and waits for the end."""
    page.get_by_role("button", name=button).click()
    expect(page.locator("#status")).not_to_have_text("Running…")


def exported(page: Page, format: str, result: int = 0) -> Path:
    """What an export button of a result saves."""
    with page.expect_download() as download:
        page.locator(f"[data-export={format}]").nth(result).click()
    return Path(download.value.path())


def exported_json(page: Page, result: int = 0) -> Any:
    return json.loads(exported(page, "json", result).read_text())


def leaders(document: Any) -> list[str]:
    """The leading expert of each token of an exported result."""
    scalings = document["scalings"]
    return [scalings["experts"][row.index(max(row))] for row in scalings["mean"]]
