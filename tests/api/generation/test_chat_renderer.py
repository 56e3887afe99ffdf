"""Chats by a template that loops, grows, dies, or is not there, through the process that renders them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.api.generation.chat_renderer import ChatRenderer
from service.chat_template import Chat, ChatTemplate
from service.contract.errors import InvalidRequestError
from tests.api.conftest import ThreadClient, serving
from tests.api.test_errors import error_of
from tests.support.fake_engine import FakeEngine, fake_info, write_bundle
from tests.support.waiting import wait_for

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = """
{%- for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}
{%- if messages[0].content == 'hang' %}ENDLESS{% endif %}
{%- if messages[0].content == 'grow' %}{{ ('x' * 2000000000) | length }}{% endif %}
{%- if messages[0].content == 'long' %}{{ 'x' * 4000000 }}{% endif %}
{%- if messages[0].content == 'divide' %}{{ 1 // 0 }}{% endif %}
{%- if messages[0].content == 'half' %}{{ "\\ud83d" }}{% endif -%}
""".replace("ENDLESS", ENDLESS)
Test = Callable[[ChatRenderer], Coroutine[Any, Any, None]]


def turn(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str) -> Chat:
    return Chat([turn(content)])


def write_template(directory: Path, template: str | None) -> Path:
    write_bundle(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "bos_token": "<s>"}))
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Test], None]:
    """Runs a test with the renderer of TEMPLATE."""

    def with_renderer(test: Test) -> None:
        async def closing() -> None:
            renderer = ChatRenderer(write_template(tmp_path, TEMPLATE), 1 << 20, render_seconds=1.0)
            try:
                await test(renderer)
            finally:
                renderer.close()

        asyncio.run(closing())

    return with_renderer


def test_as_it_is_rendered_here(run: Callable[[Test], None], tmp_path: Path) -> None:
    chats = [
        says("Hi"),
        Chat(
            [
                turn('{"a": "\n\\"} 🙂 \u2028 \x00 </s>'),
                {"role": "assistant", "content": "", "name": "é"},
                turn("x" * 90),
            ],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {"maximum": 2**70}}}],
            variables={"deep": [{"a": 1.5, "b": None}]},
        ),
        says("naïve" * 100_000),
    ]

    async def test(renderer: ChatRenderer) -> None:
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        for chat in chats:
            assert await renderer.render(chat) == template.render(chat)

    run(test)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hang", "it took over 1 seconds"),
        ("grow", "MemoryError"),
        ("long", "it makes 40000"),
        ("divide", "ZeroDivisionError"),
        ("half", "surrogate"),
        ("\ud800", "surrogate"),
    ],
)
def test_a_chat_without_a_text_is_the_caller_s_error(run: Callable[[Test], None], content: str, words: str) -> None:
    """And the next one is rendered."""

    async def test(renderer: ChatRenderer) -> None:
        with pytest.raises(InvalidRequestError, match=words) as caught:
            await renderer.render(says(content))
        assert caught.value.param == "messages"
        assert await renderer.render(says("Hi")) == "<user>Hi"

    run(test)


def test_a_process_that_dies_is_not_called_slow(run: Callable[[Test], None]) -> None:
    async def test(renderer: ChatRenderer) -> None:
        assert await renderer.render(says("Hi")) == "<user>Hi"
        assert renderer._process is not None
        assert renderer._process._child is not None
        hanging = asyncio.create_task(renderer.render(says("hang")))
        await asyncio.sleep(0.1)
        renderer._process._child._process.kill()
        with pytest.raises(InvalidRequestError, match="its process was ended by SIGKILL, perhaps for want of memory"):
            await hanging
        assert await renderer.render(says("Hi")) == "<user>Hi"

    run(test)


# -- over HTTP -------------------------------------------------------------------------------------------------------


@contextmanager
def chatting(directory: Path, template: str | None) -> Iterator[TestClient]:
    with serving(ThreadClient(FakeEngine(fake_info(write_template(directory, template))))) as http:
        yield http


def chat(http: TestClient, content: str) -> Any:
    return http.post("/v1/chat/completions", json={"messages": [turn(content)], "max_tokens": 1})


def test_a_template_that_hangs_stops_nobody(tmp_path: Path) -> None:
    """The event loop answers meanwhile, a chat beside it is answered after it, and it is a 400."""
    with chatting(tmp_path, TEMPLATE) as http:
        answers: list[Any] = []
        others = [threading.Thread(target=lambda: answers.append(chat(http, "hang")))]
        others[0].start()
        time.sleep(0.2)
        others.append(threading.Thread(target=lambda: answers.append(chat(http, "Hi"))))
        others[1].start()
        assert http.get("/livez").status_code == 200
        assert answers == [], "it did not hang: the test shows nothing"
        for other in others:
            other.join()
        assert "took over 2 seconds" in error_of(answers[0])["message"]
        assert answers[1].status_code == 200


def test_a_server_that_stops_says_so(tmp_path: Path) -> None:
    with chatting(tmp_path, TEMPLATE) as http:
        assert chat(http, "Hi").status_code == 200
        http.portal.call(http.app.state.service._chats.close)  # type: ignore[union-attr, attr-defined]
        assert error_of(chat(http, "Hi"), 503)["code"] == "stopping"


def test_a_model_without_a_template_has_no_chats(tmp_path: Path) -> None:
    with chatting(tmp_path, None) as http:
        error = error_of(chat(http, "Hi"))
        assert (error["code"], error["param"]) == ("no_chat_template", "messages")


def test_the_process_is_there_before_the_first_chat(tmp_path: Path) -> None:
    with chatting(tmp_path, TEMPLATE) as http:
        process = http.app.state.service._chats._process  # type: ignore[attr-defined]
        assert wait_for(lambda: process._child is not None)
