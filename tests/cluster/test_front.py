"""What stands in Ray's proxies: ids, errors and ends of streams, and which prompts count as beginning alike. No ray."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from service.cluster.front import SESSION_HEADER, Affinity, Front, middlewares, prefix_key

LONG = "You are a careful assistant. " * 20


def key(**body: Any) -> str | None:
    return prefix_key(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": LONG + "a"}, {"prompt": LONG + "b", "max_tokens": 3}),
        ({"prompt": list(range(100))}, {"prompt": [*range(99), 7]}),
        ({"prompt": ["one", "two"]}, {"prompt": "one"}),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "hello"},
                    {"role": "user", "content": "?"},
                ]
            },
        ),
        (
            {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": "a"}]},
            {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": "b"}]},
        ),
    ],
    ids=["text", "tokens", "several", "turns", "system"],
)
def test_what_begins_alike_has_one_key(one, other):
    assert key(**one) == key(**other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "a"}, {"prompt": "b"}),
        ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
        (
            {"messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "a"}]},
            {"messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "b"}]},
        ),
    ],
)
def test_what_begins_differently_has_not(one, other):
    assert key(**one) != key(**other)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"{}",
        b'{"prompt": 3}',
        b'{"messages": ["x"]}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"messages": []}',
    ],
)
def test_no_key_for_what_no_replica_will_accept(body):
    """... or could make sense of: the router then picks any replica, and that says what is wrong."""
    assert prefix_key(body) is None


def ask(app: ASGIApp, path: str = "/generate", **request: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(path, **request)

    return asyncio.run(run())


def proxy(status: int = 200, kind: str = "text/plain", parts: tuple[bytes, ...] = (b"x",), ended: bool = True,
          headers: tuple[tuple[bytes, bytes], ...] = ()) -> ASGIApp:  # fmt: skip
    """Ray's proxy, as it answers with its second request id."""

    async def app(scope, receive, send):
        given = dict(scope["headers"])[b"x-request-id"]
        own = [(b"content-type", kind.encode()), (b"x-request-id", given), (b"x-request-id", given), *headers]
        await send({"type": "http.response.start", "status": status, "headers": own})
        for number, part in enumerate(parts):
            more = not ended or number < len(parts) - 1
            await send({"type": "http.response.body", "body": part, "more_body": more})

    return app


async def silent(scope, receive, send):
    """Ray's proxy when the replica has died before its answer began."""


async def broken(scope, receive, send):
    raise RuntimeError("a bug in the proxy")


def test_what_a_replica_says_goes_through_with_one_id():
    answer = ask(Front(proxy(400, "application/json", (b"{}",))), headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.content) == (400, b"{}")
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_plain_text_that_is_not_rays_goes_through():
    """Starlette's refusal of a preflight request is one."""
    assert ask(Front(proxy(400, parts=(b"Disallowed CORS origin",)))).text == "Disallowed CORS origin"


def test_an_id_that_cannot_stand_in_a_log_is_replaced():
    answer = ask(Front(proxy()), headers={"X-Request-Id": "no spaces, please"})
    [given] = answer.headers.get_list("x-request-id")
    assert given.startswith("req-")


@pytest.mark.parametrize(
    ("app", "status", "code", "retry"),
    [
        (proxy(429, headers=((b"retry-after", b"7"),)), 429, "overloaded", "7"),
        (proxy(503), 503, "unavailable", "5"),
        (proxy(404), 503, "unavailable", "5"),
        (proxy(408), 504, "timeout", None),
        (proxy(500), 500, "replica_lost", None),
        (silent, 500, "replica_lost", None),
        (broken, 500, "replica_lost", None),
    ],
)
def test_what_ray_says_itself_gets_our_shape(app, status, code, retry):
    answer = ask(Front(app), headers={"X-Request-Id": "mine"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], answer.headers.get("retry-after")) == (status, code, retry)
    assert set(error) >= {"message", "type", "param", "code"}
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_a_stream_that_breaks_off_ends_with_an_error_event():
    answer = ask(Front(proxy(kind="text/event-stream; charset=utf-8", parts=(b"data: 1\n\n",), ended=False)))
    first, last, rest = answer.text.split("\n\n")
    assert (first, rest) == ("data: 1", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_whole_stream_is_left_alone():
    answer = ask(Front(proxy(kind="text/event-stream", parts=(b"data: 1\n\n", b"data: [DONE]\n\n"))))
    assert answer.text == "data: 1\n\ndata: [DONE]\n\n"


def test_rays_own_paths_are_rays():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"draining"})

    assert ask(Front(app), "/-/healthz").text == "draining"


def seen(path: str, **request: Any) -> dict[str, Any]:
    """What comes out behind all middlewares: the session and the body."""

    async def app(scope, receive, send):
        message = await receive()
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        found = {"session": headers.get(SESSION_HEADER), "body": message["body"].decode()}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(found).encode()})

    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    found: dict[str, Any] = ask(app, path, **request).json()
    return found


def test_prompts_name_their_session_and_bodies_arrive_whole():
    body = json.dumps({"prompt": "a"})
    assert seen("/generate", content=body) == {"session": key(prompt="a"), "body": body}
    assert seen("/compare", content=body) == {"session": key(prompt="a"), "body": body}
    assert seen("/tokenize", content=body) == {"session": None, "body": body}
    assert seen("/generate", content=b"{") == {"session": None, "body": "{"}
    assert seen("/generate", content=body, headers={SESSION_HEADER: "mine"})["session"] == "mine"


def test_a_body_over_the_limit_gets_no_further():
    assert seen("/generate", content=b"x" * (5 << 20))["error"]["code"] == "payload_too_large"


def test_a_client_that_leaves_is_seen_behind_the_replayed_body():
    messages = iter([{"type": "http.request", "body": b'{"prompt": "a"}'}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    got = []

    async def app(scope, receive, send):
        got.extend([await receive(), await receive()])

    scope = {"type": "http", "path": "/generate", "headers": []}
    asyncio.run(Affinity(app)(scope, receive, None))
    assert [one["type"] for one in got] == ["http.request", "http.disconnect"]
