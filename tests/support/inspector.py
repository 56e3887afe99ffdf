"""The inspector page in a Chromium that is installed already: how it is found, opened and used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect

from tests.support.server_process import Server
from tests.support.waiting import PATIENCE_SECONDS

MISSING = "no Chromium is installed (Debian: apt-get install chromium)"
WIDTH = 1440
ANSWER = ".token:not(.prompt)"  # the tokens of an answer
SWITCHING_PROMPT = "What is 88 + 76? Which strand pairs with CTA TCT TAT?\n"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# As root there is no sandbox; the others keep the browser from calling its maker's hosts.
_ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)

expect.set_options(timeout=PATIENCE_SECONDS * 1000)


def browser_path() -> str | None:
    """An installed browser."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def launch(playwright: Playwright, path: str) -> Browser:
    return playwright.chromium.launch(executable_path=path, args=_ARGUMENTS.split())


def new_context(browser: Browser) -> BrowserContext:
    """A profile without storage, cookies or cache, whose pages may use the clipboard."""
    context = browser.new_context(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE_SECONDS * 1000)
    return context


def close(page: Page) -> None:
    """Closes a tab, and removes what its pages have stored for the next one of its context."""
    if page.url.startswith("http"):
        page.evaluate("() => localStorage.clear()")
    page.close()


def open_inspector(page: Page, running: Server, fragment: str = "") -> Page:
    """The page, ready for input."""
    page.goto(f"http://127.0.0.1:{running.port}/{fragment}")
    expect(page.locator("#form:not([inert])")).to_be_visible()
    return page


def run(page: Page, button: str = "Generate") -> None:
    """Presses the button, and waits for the end."""
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#status")).not_to_have_text("Running…")


def copied(page: Page, button: str) -> str:
    """What a copy button puts into the clipboard."""
    page.get_by_role("button", name=button).click()
    expect(page.locator("#status")).to_contain_text(" copied.")
    text: str = page.evaluate("() => navigator.clipboard.readText()")
    return text


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
