"""Conversations: what is sent of them, and what becomes of them when a turn is edited, tried again or stopped."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
from playwright.sync_api import Page, Request, expect

from tests.support.inspector import ANSWER, copied, exported_json, run
from tests.support.server_process import Server

FIRST, SECOND = "Compute 48 + 87.", "Translate the DNA CCC ACT."


@pytest.fixture
def sent(inspector: Page) -> list[list[dict[str, str]]]:
    """The messages that the page has had written by the template, and the open tab for chats."""
    found: list[list[dict[str, str]]] = []

    def keep(request: Request) -> None:
        if request.url.endswith("/tokenize"):
            found.append(json.loads(request.post_data or "")["messages"])

    inspector.on("request", keep)
    inspector.get_by_role("tab", name="Chat").click()
    return found


def say(page: Page, message: str) -> None:
    """Sends it by the keyboard, and waits for the answer."""
    page.locator("[name=message]").fill(message)
    page.locator("[name=message]").press("Enter")
    expect(page.locator("#run")).to_be_enabled()


def answers(page: Page) -> list[str]:
    """What has been written in each turn."""
    turns = page.locator(".turn").all()
    return ["".join(turn.locator(ANSWER).all_text_contents()).removesuffix("</s>") for turn in turns]


def chatted(server: Server, messages: list[dict[str, str]]) -> str:
    """The server's own answer to a conversation."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 128}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_turns_are_those_of_the_chat_route(
    inspector: Page, demo_server: Server, sent: list[list[dict[str, str]]]
) -> None:
    """Each answer is what OpenAI's route writes; an edited turn replaces all that follow, a retried one its answer."""
    inspector.fill("[name=system]", "Be brief.")
    say(inspector, FIRST)
    inspector.fill("[name=message]", SECOND)
    snippet = copied(inspector, "Copy as curl")
    run(inspector, "Send")
    first, second = answers(inspector)
    system, begin = message("system", "Be brief."), message("user", FIRST)
    whole = [system, begin, message("assistant", first), message("user", SECOND)]
    assert sent == [[system, begin], whole]
    assert [first, second] == [chatted(demo_server, sent[0]), chatted(demo_server, whole)]
    asked: Any = json.loads(subprocess.run(["bash", "-c", snippet], capture_output=True, check=True).stdout)
    assert asked["choices"][0]["message"]["content"] == second
    assert inspector.locator(".message").all_inner_texts() == [FIRST, SECOND]
    assert "".join(token["text"] for token in exported_json(inspector, 1)["prompt"]["tokens"]).endswith(f"{SECOND}\n")

    inspector.get_by_role("button", name="Retry answer 2").click()
    expect(inspector.locator("#run")).to_be_enabled()
    assert (sent[2], answers(inspector)) == (whole, [first, second])
    inspector.get_by_role("button", name="Edit message 1").click()
    expect(inspector.locator("[name=message]")).to_be_focused()
    expect(inspector.locator("[name=message]")).to_have_value(FIRST)
    expect(inspector.locator("#editing-note")).to_have_text("Replaces message 1 and all that follows.")
    say(inspector, "Add 53 and 88.")
    assert sent[3] == [system, message("user", "Add 53 and 88.")]
    assert answers(inspector) == [chatted(demo_server, sent[3])]
    expect(inspector.locator("#editing")).to_be_hidden()


def test_a_stopped_answer_stays_and_a_refused_one_takes_nothing_away(
    inspector: Page, sent: list[list[dict[str, str]]]
) -> None:
    inspector.locator("summary", has_text="More sampling").click()
    inspector.check("[name=ignore_eos]")
    inspector.fill("[name=max_tokens]", "4000")
    inspector.fill("[name=message]", FIRST)
    inspector.click("#run")
    expect(inspector.locator(ANSWER).nth(5)).to_be_visible()
    expect(inspector.locator(".summary")).to_contain_text(re.compile("[0-9]+ tokens so far *[0-9]+ tokens/s"))
    inspector.get_by_role("button", name="Stop").click()
    expect(inspector.locator("#status")).to_have_text("Answer 1: X-LoRA: stopped.")
    [partial] = answers(inspector)
    inspector.fill("[name=max_tokens]", "9000")
    inspector.get_by_role("button", name="Retry answer 1").click()
    expect(inspector.locator("[name=max_tokens]")).to_have_attribute("aria-invalid", "true")
    assert answers(inspector) == [partial]
    inspector.fill("[name=max_tokens]", "3")
    assert inspector.locator("[aria-invalid]").count() == 0, "it is being mended"
    say(inspector, SECOND)
    assert sent[-1][1]["role"] == "assistant"
    assert partial.startswith(sent[-1][1]["content"])
    inspector.get_by_role("button", name="New conversation").click()
    expect(inspector.locator(".turn")).to_have_count(0)
