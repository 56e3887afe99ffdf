"""The inspector page in a headless Chromium, before the real server on the demo bundle.

The browser is not Playwright's own download but one that is installed; without one these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.inspector import MISSING, browser_path, launch, new_page, open_inspector, run
from tests.support.server_process import Server, server


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    with server("--threads", "1") as running:
        yield running


@pytest.fixture(scope="module")  # not session: while it runs, asyncio.run() is not possible in other tests
def browser() -> Iterator[Browser]:
    path = browser_path()
    if path is None:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        browser = launch(playwright, path)
        yield browser
        browser.close()


@contextmanager
def tab(browser: Browser) -> Iterator[Page]:
    """An empty one. An error of a script or of the content security policy is a failure."""
    page = new_page(browser)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if "Failed to load resource" not in said.text else None)
    yield page
    page.context.close()
    assert problems == []


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with tab(browser) as page:
        yield page


@pytest.fixture
def inspector(page: Page, demo_server: Server) -> Page:
    """The page, ready for input."""
    return open_inspector(page, demo_server)


@pytest.fixture(scope="module")
def written(browser: Browser, demo_server: Server) -> Iterator[Page]:
    """The page with the answer to its own first prompt, whose domain changes in the middle: tests only look at it."""
    with tab(browser) as page:
        run(open_inspector(page, demo_server))
        yield page
