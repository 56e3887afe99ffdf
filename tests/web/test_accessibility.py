"""axe-core finds nothing to complain about, in both themes, in every state of the page."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.support.inspector import ANSWER, run


def empty(page: Page) -> None:
    pass


def result(page: Page) -> None:
    run(page)
    page.locator(ANSWER).nth(3).click()


def comparison(page: Page) -> None:
    page.get_by_role("button", name="Add a setting").click()
    for more in page.locator("#form summary").all():
        more.click()
    run(page)
    page.locator("#history summary").click()
    page.get_by_role("checkbox", name=re.compile("^Compare: ")).first.check()


def error(page: Page) -> None:
    page.fill("[name=max_tokens]", "9000")
    run(page)


def scalings(page: Page) -> None:
    page.get_by_role("tab", name="Scalings").click()
    page.fill("[name=text]", "Compute 48 + 87.")
    run(page, "Show scalings")


def key(page: Page) -> None:
    page.get_by_role("button", name="API key").click()


def snippet(page: Page) -> None:
    """Where the browser refuses both ways to copy."""
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    page.evaluate("() => { document.execCommand = () => false; }")
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#snippet-note")).not_to_be_empty()


def chat(page: Page) -> None:
    page.get_by_role("tab", name="Chat").click()
    for message in ("Compute 48 + 87.", "Translate the DNA CCC ACT."):
        page.fill("[name=message]", message)
        run(page, "Send")
    page.get_by_role("button", name="Edit message 2").click()


def colours(page: Page) -> None:
    run(page)
    page.select_option("#colour", "entropy")
    page.locator(".summary .figure").first.focus()


def weights(page: Page) -> None:
    page.select_option("[name='a.experts']", "weights")


# A comparison has all that one result has, and more.
SLOW = [pytest.param(state, marks=pytest.mark.slow) for state in (result, colours, snippet)]


@pytest.mark.parametrize("state", [empty, comparison, chat, error, scalings, key, weights, *SLOW])
def test_no_violations(inspector: Page, state: Callable[[Page], None]) -> None:
    inspector.emulate_media(color_scheme="light", reduced_motion="reduce")
    state(inspector)
    for theme in ("light", "dark"):
        inspector.emulate_media(color_scheme=theme, reduced_motion="reduce")
        found = Axe().run(inspector)
        assert found.violations_count == 0, f"{theme}: {found.generate_report()}"


def test_axe_sees_a_violation(inspector: Page) -> None:
    """Negative control: a field that loses its label is found."""
    inspector.locator("[name=max_tokens]").evaluate("input => input.parentElement.replaceWith(input)")
    inspector.locator("[name=max_tokens]").evaluate("input => input.removeAttribute('placeholder')")
    assert "label" in {violation["id"] for violation in Axe().run(inspector).response["violations"]}


def test_outline_of_the_page(inspector: Page) -> None:
    """Landmarks and live regions that a screen reader moves by."""
    expect(inspector.get_by_role("main")).to_have_count(1)
    expect(inspector.get_by_role("form", name="Request")).to_have_count(1)
    expect(inspector.get_by_role("status").first).to_have_attribute("id", "status")
    run(inspector)
    options = inspector.get_by_role("listbox").get_by_role("option")
    expect(options.first).to_have_accessible_name(re.compile("^no text, the gate is not known$"))
    expect(inspector.get_by_role("option", name=re.compile("^Ones, math [0-9]+ percent$"))).to_have_count(1)


def test_narrow_screen_has_no_sideways_scrolling(inspector: Page) -> None:
    inspector.set_viewport_size({"width": 360, "height": 740})
    run(inspector)
    assert inspector.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    expect(inspector.locator(".result h2")).to_be_in_viewport()
