"""What the page says when something goes wrong, and that Stop stops the server."""

from __future__ import annotations

import json
import re

from playwright.sync_api import Page, Route, expect

from tests.support.inspector import ANSWER, copied, open_inspector, run
from tests.support.server_process import Server
from tests.support.waiting import wait_for

REFUSED = {"message": "a valid key is needed", "type": "authentication_error", "param": None, "code": "invalid_api_key"}


def test_stop_stops_the_server(inspector: Page, demo_server: Server) -> None:
    inspector.fill("[name=max_tokens]", "4000")
    inspector.locator("summary", has_text="More sampling").click()
    inspector.check("[name=ignore_eos]")
    inspector.click("#run")
    expect(inspector.locator(ANSWER).nth(5)).to_be_visible()
    inspector.get_by_role("button", name="Stop").click()
    expect(inspector.locator("#status")).to_have_text("X-LoRA: stopped.")
    assert wait_for(lambda: demo_server.metric("xlora_requests_running") == 0)
    shown = inspector.locator(ANSWER).count()
    expect(inspector.locator(".summary")).to_have_text(f"stopped after {shown} tokens")
    assert 5 < shown < 4000
    inspector.fill("[name=max_tokens]", "5")
    run(inspector)  # and it can go on
    expect(inspector.locator(".summary")).to_contain_text("ended by")


def test_refusal_is_shown_at_its_field(inspector: Page) -> None:
    inspector.fill("[name=max_tokens]", "9000")
    run(inspector)
    error = inspector.get_by_role("alert")
    expect(error).to_contain_text("over the context of 8192 tokens")
    expect(error).to_contain_text("Hint: lower max_tokens to")
    expect(error).to_contain_text("field: max_tokens · code: context_length_exceeded")
    expect(inspector.locator("[name=max_tokens]")).to_have_attribute("aria-invalid", "true")
    inspector.fill("[name=max_tokens]", "3")
    run(inspector)
    assert inspector.locator(ANSWER).count() == 3
    assert inspector.locator("[aria-invalid]").count() == 0


def test_refused_steering_is_shown_at_its_setting(inspector: Page) -> None:
    error = {"message": "no expert `x`", "type": "invalid_request_error", "param": "experts.only", "code": "not_found"}

    def refuse(route: Route) -> None:
        if "experts" in json.loads(route.request.post_data or ""):
            route.fulfill(status=400, json={"error": error})
        else:
            route.continue_()

    inspector.route("**/generate", refuse)
    inspector.get_by_role("button", name="Add a setting").click()
    inspector.select_option("[name='b.experts']", "only")
    run(inspector)
    assert inspector.locator(".result").nth(0).locator(ANSWER).count() > 0, "the other setting goes on"
    expect(inspector.locator(".result").nth(1).get_by_role("alert")).to_contain_text("no expert `x`")
    expect(inspector.locator("[name='b.experts']")).to_have_attribute("aria-invalid", "true")
    assert inspector.locator("[aria-invalid]").count() == 1


def test_input_that_is_no_number_is_not_sent(inspector: Page) -> None:
    inspector.locator("summary", has_text="More sampling").click()
    inspector.locator("[name=top_p]").press_sequentially("-")
    inspector.locator("summary", has_text="More sampling").click()
    inspector.click("#run")
    expect(inspector.locator("[name=top_p]")).to_be_focused()
    assert inspector.locator(".result").count() == 0


def test_error_within_a_stream(inspector: Page) -> None:
    error = {"message": "the engine has died", "type": "server_error", "param": None, "code": "engine_dead"}
    event = {"index": 0, "text": "a", "tokens": [{"id": 1, "text": "a"}], "finish_reason": None}
    event["scalings"] = {"experts": ["math"], "sites": ["s"], "mean": [[1]], "entropy": [0]}
    body = f"data: {json.dumps(event)}\n\ndata: {json.dumps({'error': error})}\n\n"
    inspector.route("**/generate", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    run(inspector)
    expect(inspector.get_by_role("alert")).to_contain_text("the engine has died")
    assert inspector.locator(ANSWER).count() == 1, "what had come stays"


def test_stream_that_breaks_off(inspector: Page) -> None:
    inspector.route("**/generate", lambda route: route.fulfill(body="", content_type="text/event-stream"))
    run(inspector)
    expect(inspector.get_by_role("alert")).to_contain_text("broke off before its end")


def test_unreachable_server(inspector: Page) -> None:
    inspector.route("**/generate", lambda route: route.abort())
    run(inspector)
    expect(inspector.get_by_role("alert")).to_contain_text("the server cannot be reached")


def test_key_is_asked_for_and_sent(page: Page, demo_server: Server) -> None:
    """A 401 opens the dialog; a wrong key opens it again; the right one is sent from then on, and kept on a reload."""

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer correct horse":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": REFUSED})

    for path in ("info", "metrics", "generate"):
        page.route(f"**/{path}", guard)
    page.goto(f"http://127.0.0.1:{demo_server.port}/")
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("The server asks for a key.")
    dialog.get_by_label("Key").fill("wrong")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_contain_text("The server did not accept this key.")
    dialog.get_by_label("Key").fill("correct horse")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_have_text("demo")
    run(page)
    assert page.locator(ANSWER).count() > 0
    snippet = copied(page, "Copy as curl")
    assert "Bearer $XLORA_API_KEY" in snippet
    assert "correct horse" not in snippet
    assert "correct" not in page.url
    page.reload()
    expect(page.locator("#model")).to_have_text("demo")
    expect(dialog).to_be_hidden()


def test_without_a_key_the_error_is_shown(page: Page, demo_server: Server) -> None:
    page.route("**/info", lambda route: route.fulfill(status=401, json={"error": REFUSED}))
    page.goto(f"http://127.0.0.1:{demo_server.port}/#prompt=Compute")
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_contain_text("a valid key is needed")
    run(page)  # where only the operator may read /info, the experts' names come with the first answer
    assert page.locator(ANSWER).count() > 0
    page.select_option("[name='a.experts']", "only")
    expect(page.locator("#setting-a").get_by_role("checkbox")).to_have_count(4)


def test_loading_is_waited_for(page: Page, demo_server: Server) -> None:
    answers = [503]

    def load(route: Route) -> None:
        if answers:
            error = {
                "message": "the model is still loading",
                "type": "server_error",
                "param": None,
                "code": "unavailable",
            }
            route.fulfill(status=answers.pop(), json={"error": error})
        else:
            route.continue_()

    page.route("**/info", load)
    page.goto(f"http://127.0.0.1:{demo_server.port}/")
    expect(page.locator("#status")).to_contain_text("the model is still loading")
    expect(page.locator("#model")).to_have_text("demo")


def test_refused_metrics_leave_the_strip_empty(page: Page, demo_server: Server) -> None:
    page.route("**/metrics", lambda route: route.fulfill(status=401, json={"error": REFUSED}))
    open_inspector(page, demo_server)
    figure = page.locator("#live .figure").first
    expect(figure).to_have_attribute("data-tip", re.compile("^No metrics: a valid key is needed. Requests that "))
    assert page.locator("[data-live]").all_inner_texts() == ["–"] * 5
    expect(page.get_by_role("dialog")).to_have_count(0)
