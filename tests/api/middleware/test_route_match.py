"""Who may ask hangs on the route that the router chooses, whatever the spelling of the path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from starlette.types import Message

from service.api.app import create_app
from service.api.middleware.security import ADMIN_ROUTES, OPEN_ROUTES
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.api.conftest import ThreadClient, serving
from tests.api.connections.test_connections import running
from tests.api.middleware.test_security import ADMIN, KEY, ask
from tests.support.spellings import CONTROL, spellings

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
USERS = {
    *("/generate", "/compare", "/scalings", "/tokenize", "/detokenize"),
    *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name:path}"),
    *("/examples", "/openapi.json"),
}
PATCH = b'{"global_scaling_weight": 0.0, "enabled": true}'


async def asked(
    app: Any, method: str, raw_path: str, key: str | None, root_path: str = ""
) -> tuple[int, dict[str, str], bytes]:
    """One request, with the scope that uvicorn makes of its head."""
    sent: list[Message] = []
    bodies = [PATCH]

    async def receive() -> Message:
        if not bodies:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"x"), (b"content-type", b"application/json")]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "query_string": b""},
        **{"method": method, "path": root_path + unquote(raw_path), "raw_path": raw_path.encode()},
        **{"root_path": root_path, "headers": headers, "server": ("x", 80), "client": ("y", 1), "state": {}},
    }
    await app(scope, receive, send)
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
def http(client: ThreadClient) -> Iterator[TestClient]:
    with serving(client, api_keys=KEY, admin_keys=ADMIN) as http:
        yield http


def paths_of(http: TestClient) -> list[str]:
    return sorted({route.path or "" for route in iter_route_contexts(http.app.routes)})  # type: ignore[attr-defined]


def test_every_entry_of_the_tables_is_a_route_and_every_route_is_in_one(http: TestClient) -> None:
    """Whoever adds a route says here who may ask it; until then it takes any key."""
    assert OPEN_ROUTES.isdisjoint(ADMIN_ROUTES)
    assert {*OPEN_ROUTES, *ADMIN_ROUTES, *USERS} == set(paths_of(http))


async def refused(app: Any, method: str, raw_path: str, key: str | None, admin_only: bool) -> None:
    """Asserts that a spelling of a guarded path is not served, not even where a redirect leads."""
    what = (method, raw_path, key)
    status, headers, body = await asked(app, method, raw_path, key)
    if status == 307 and admin_only:  # a slash too many, or too few
        assert key is not None, what
        status, _, body = await asked(app, method, urlsplit(headers["location"]).path, key)
        assert status == 401, what
    elif any(character in raw_path for character in CONTROL):
        assert status == 404, what
    else:
        assert status == 401 or (admin_only and key is not None and status in (404, 405)), what
    if method != "HEAD":
        assert json.loads(body)["error"]["message"], what


@pytest.mark.parametrize("path", sorted(ADMIN_ROUTES))
def test_no_spelling_and_no_method_opens_an_operator_s_route(http: TestClient, client: ThreadClient, path: str) -> None:
    async def scene() -> None:
        for raw_path in spellings(path):
            if unquote(raw_path).startswith("/web/"):
                continue
            for method in METHODS:
                for key in (None, KEY):
                    await refused(http.app, method, raw_path, key, admin_only=True)
            same = unquote(raw_path) == path
            assert not same or (await asked(http.app, "GET", raw_path, KEY))[0] == 401
            assert same == ((await asked(http.app, "GET", raw_path, ADMIN))[0] == 200), raw_path

    http.portal.call(scene)  # type: ignore[union-attr]
    assert client.engine.gates == []
    assert not client.engine.logs_scalings


def test_no_spelling_of_any_other_route_is_open_without_a_key(http: TestClient) -> None:
    async def scene() -> None:
        for path in sorted(USERS):
            for raw_path in spellings(path.replace("{name:path}", "demo")):
                if not unquote(raw_path).startswith("/web/"):
                    for method in ("GET", "POST"):
                        await refused(http.app, method, raw_path, None, admin_only=False)
            assert (await asked(http.app, "OPTIONS", path.replace("{name:path}", "fake"), KEY))[0] == 405

    http.portal.call(scene)  # type: ignore[union-attr]


def test_only_the_open_paths_themselves_are_open(http: TestClient) -> None:
    async def scene() -> None:
        for path in OPEN_ROUTES - {"/web"}:
            for raw_path in spellings(path):
                status, _, _ = await asked(http.app, "GET", raw_path, None)
                if unquote(raw_path) in OPEN_ROUTES - {"/web"}:
                    assert status == 200, raw_path
                else:
                    assert status in (401, 404), raw_path
        for raw_path in ("/web/../metrics", "/web/%2e%2e/metrics", "/web/..%2fapi%2fapp.py", "/web//etc/passwd"):
            assert (await asked(http.app, "GET", raw_path, None))[0] == 404
        assert (await asked(http.app, "GET", "/web", None))[0] == 401

    http.portal.call(scene)  # type: ignore[union-attr]


def test_with_admin_keys_alone_their_routes_are_closed_and_the_others_open(client: ThreadClient) -> None:
    async def scene() -> None:
        for path in ADMIN_ROUTES:
            for raw_path in spellings(path):
                status, headers, _ = await asked(http.app, "GET", raw_path, None)
                if status == 307:
                    status, _, _ = await asked(http.app, "GET", urlsplit(headers["location"]).path, None)
                assert status in (401, 404), raw_path
        assert (await asked(http.app, "GET", "/v1/models", None))[0] == 200

    with serving(client, admin_keys=ADMIN) as http:
        http.portal.call(scene)  # type: ignore[union-attr]


def test_a_control_character_is_404_before_keys_and_origins(client: ThreadClient) -> None:
    with serving(client, api_keys=KEY, cors_origins="https://a.example") as http:
        for character in CONTROL:
            for path in (
                f"/livez{character}",
                f"/{character}",
                f"/web/index.html{character}",
                f"/v1/models/{character}",
            ):
                for key in (None, KEY):
                    status, headers, body = http.portal.call(asked, http.app, "GET", path, key)  # type: ignore[union-attr]
                    assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")
                    assert headers["x-request-id"]


@pytest.mark.parametrize("root_path", ["/prefix", "/metrics"])
def test_behind_a_prefix_the_route_decides_too(http: TestClient, root_path: str) -> None:
    def status(path: str, key: str | None) -> int:
        found: int = http.portal.call(asked, http.app, "GET", path, key, root_path)[0]  # type: ignore[union-attr]
        return found

    assert [status("/metrics", key) for key in (None, KEY, ADMIN)] == [401, 401, 200]
    assert [status("/v1/models", key) for key in (None, KEY, ADMIN)] == [401, 200, 200]
    assert status("/livez", None) == 200
    assert status("", None) == 401


def test_what_is_counted_is_the_route(http: TestClient) -> None:
    for raw_path, recorded in (("/generate", 1), ("/%67enerate", 2), ("/generate%0A", 2), ("/generate/", 2)):
        http.portal.call(asked, http.app, "POST", raw_path, KEY)  # type: ignore[union-attr]
        metrics = http.get("/metrics", headers={"Authorization": f"Bearer {ADMIN}"}).text
        assert f'xlora_requests_total{{endpoint="/generate",outcome="invalid"}} {recorded}.0' in metrics


def test_a_websocket_is_closed_whatever_it_asks_for(client: ThreadClient) -> None:
    sent: list[Message] = []

    async def scene() -> None:
        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/metrics", "raw_path": b"/metrics", "headers": [], "query_string": b""}
        await http.app(scope, receive, send)

    with TestClient(create_app(client, Settings(), Metrics(CollectorRegistry()))) as http:
        http.portal.call(scene)  # type: ignore[union-attr]
    assert sent == [{"type": "websocket.close"}]


@pytest.fixture
def address(client: ThreadClient) -> Iterator[tuple[str, int]]:
    with running(client, Settings(api_keys=KEY, admin_keys=ADMIN)) as address:  # type: ignore[arg-type]
        yield address


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/metrics",
            "/%6detrics",
            "/metrics%0A",
            "/metrics%00",
            "/metrics;x",
            "//metrics",
            "/./metrics",
            "/metrics?a=b",
        ),
        *("http://host/metrics", "http://host/metrics%0A", "http://host/%6Detrics", "http://x:y@host:1/metrics#a"),
        *("/gate%0A", "/info%E2%80%A8", "/scalings/log.npz%0A", "/web/../metrics", "*", "/METRICS"),
    ],
)
def test_over_a_socket(address: tuple[str, int], target: str) -> None:
    for key in ("", KEY):
        head = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\r\n"
        answer = ask(address, head.encode())
        assert answer[:13] in (b"HTTP/1.1 401 ", b"HTTP/1.1 404 "), answer
        assert b'"error"' in answer
