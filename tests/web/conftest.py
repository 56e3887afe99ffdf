"""The inspector page in a headless Chromium, before the real server on the demo bundle.

The browser is not Playwright's own download but one that is installed; without one these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.support.inspector import MISSING, browser_path, close, launch, new_context, open_inspector, run
from tests.support.server_process import Server


@pytest.fixture(scope="module")  # not session: while it runs, asyncio.run() is not possible in other tests
def browser() -> Iterator[Browser]:
    path = browser_path()
    if path is None:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        browser = launch(playwright, path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One for all tabs of a module: loading and compiling the page's scripts again costs a second of CPU time."""
    context = new_context(browser)
    yield context
    context.close()


@contextmanager
def tab(context: BrowserContext) -> Iterator[Page]:
    """An empty one. An error of a script or of the content security policy is a failure."""
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if "Failed to load resource" not in said.text else None)
    yield page
    close(page)
    assert problems == []


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    with tab(context) as page:
        yield page


@pytest.fixture
def inspector(page: Page, demo_server: Server) -> Page:
    """The page, ready for input."""
    return open_inspector(page, demo_server)


@pytest.fixture(scope="module")
def written(context: BrowserContext, demo_server: Server) -> Iterator[Page]:
    """The page with the answer to its own first prompt, whose domain changes in the middle: tests only look at it."""
    with tab(context) as page:
        run(open_inspector(page, demo_server))
        yield page
