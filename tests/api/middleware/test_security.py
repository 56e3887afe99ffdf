"""Keys, origins and limits: who may ask what, and what abuse costs."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from service.api.connections.open_connections import OpenConnections
from service.api.middleware.keys import Keys, reload
from service.api.middleware.security import BodyLimit
from service.commands.serve import configuration
from service.contract.errors import SettingsError
from service.settings import Settings
from tests.api.conftest import ThreadClient, serving
from tests.api.connections.test_connections import running
from tests.api.test_errors import error_of
from tests.support.waiting import PATIENCE_SECONDS

KEY, OTHER, ADMIN, NEW = "first-key-of-two", "second-key-of-two", "the-admin-key", "a-key-that-comes-later"
BODY = {"prompt": "a", "max_tokens": 1}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n  {OTHER}  \n")
    return str(path)


def test_everything_but_the_probes_needs_a_key_once_there_is_one(client: ThreadClient, keys: str) -> None:
    with serving(client, api_key_file=keys, api_keys="third-key-from-env") as http:
        document = http.get("/openapi.json", headers=bearer(KEY)).json()
        assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
        for path, operations in document["paths"].items():
            for method in operations:
                refused = http.request(method, path, json=BODY if method == "post" else None)
                if path in ("/livez", "/readyz"):
                    assert refused.status_code == 200
                else:
                    assert error_of(refused, 401)["code"] == "invalid_api_key"
                    assert refused.headers["www-authenticate"] == "Bearer"
                    assert "401" in operations[method]["responses"]
        for path in ("/openapi.json", "/examples", "/nowhere"):
            assert http.get(path).status_code == 401
        for path in ("/", "/docs", "/redoc", "/web/docs.js"):  # pages that ask for the key themselves
            assert http.get(path).status_code == 200
        for key in (KEY, OTHER, "third-key-from-env"):
            assert http.post("/generate", json=BODY, headers=bearer(key)).status_code == 200
        for wrong in ("", KEY[:-1], KEY + "x", "# ours", "naïve-naïve"):
            header = {"Authorization": f"Bearer {wrong}".encode()}
            assert http.post("/generate", json=BODY, headers=header).status_code == 401
        assert http.post("/generate", json=BODY, headers={"Authorization": f"Basic {KEY}"}).status_code == 401


def test_admin_keys_take_the_operator_s_paths(client: ThreadClient, keys: str) -> None:
    with serving(client, api_key_file=keys, admin_keys=ADMIN) as http:
        for path in ("/metrics", "/health", "/info"):
            assert http.get(path, headers=bearer(KEY)).status_code == 401
            assert http.get(path, headers=bearer(ADMIN)).status_code == 200
        assert http.post("/generate", json=BODY, headers=bearer(ADMIN)).status_code == 200
    with serving(ThreadClient(client.engine), admin_keys=ADMIN) as http:
        assert http.get("/metrics").status_code == 401
        assert http.post("/generate", json=BODY).status_code == 200


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", "two words of a key\n", "schlüssel-schlüssel\n"])
def test_a_file_of_keys_that_has_none_is_an_error_and_never_an_open_door(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(SettingsError, match="api-key") as caught:
        Keys(str(path), None, "api-key")
    assert content.strip("# \n") not in str(caught.value) or not content.strip("# \n")
    with pytest.raises(SettingsError, match="cannot be read"):
        Keys(str(tmp_path / "absent"), None, "api-key")


def test_an_empty_variable_of_keys_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLORA_API_KEYS", "")
    with pytest.raises(SettingsError):
        Keys(None, Settings().api_keys, "api-key")


def test_keys_are_replaced_for_the_next_request(client: ThreadClient, keys: str, tmp_path: Path) -> None:
    """All files or none: a key that leaks is closed out by a rotation that works, and by no half of one."""
    admin = tmp_path / "admin"
    admin.write_text(ADMIN)

    def accepted(http: TestClient) -> set[str]:
        answers = {key: http.post("/generate", json=BODY, headers=bearer(key)) for key in (KEY, NEW, ADMIN, "")}
        return {key for key, answer in answers.items() if answer.status_code == 200}

    with serving(client, api_key_file=keys, admin_key_file=str(admin)) as http:
        every = http.app.state.service.keys  # type: ignore[attr-defined]
        assert accepted(http) == {KEY, ADMIN}
        Path(keys).write_text(NEW)
        assert accepted(http) == {KEY, ADMIN}
        assert reload(every) == f"1 in {keys}, 1 in {admin}"
        assert accepted(http) == {NEW, ADMIN}
        Path(keys).write_text(KEY)
        admin.write_text("short")
        with pytest.raises(SettingsError, match="admin-key"):
            reload(every)
        assert accepted(http) == {NEW, ADMIN}


def test_keys_are_not_in_what_settings_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLORA_API_KEYS", KEY)
    assert KEY not in repr(Settings())


def test_other_origins_are_allowed_only_when_named(client: ThreadClient) -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with serving(client) as http:
        assert "access-control-allow-origin" not in http.post("/generate", json=BODY, headers=preflight).headers
        assert http.options("/generate", headers=preflight).status_code == 405
    with serving(ThreadClient(client.engine), cors_origins="https://a.example, https://b.example") as http:
        assert (
            http.options("/generate", headers=preflight).headers["access-control-allow-origin"] == "https://a.example"
        )
        others = http.options("/generate", headers=preflight | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in others.headers


@pytest.mark.parametrize("origins", ["https://a.example", "https://a.example/, http://b:3000", "*"])
def test_pages_of_allowed_origins_may_send_any_header(client: ThreadClient, origins: str) -> None:
    """As openai's client in a browser does; others may not."""
    headers = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,openai-beta,x-mine"
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    with serving(client, cors_origins=origins) as http:
        answer = http.options("/v1/chat/completions", headers=asks | {"Origin": "https://a.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-headers"] == headers
        assert answer.headers["access-control-allow-origin"] in ("*", "https://a.example")
        posted = http.post("/generate", json=BODY, headers={"Origin": "https://a.example"})
        assert posted.headers["access-control-allow-origin"] in ("*", "https://a.example")
        evil = http.options("/v1/chat/completions", headers=asks | {"Origin": "https://evil.example"})
        assert evil.headers.get("access-control-allow-origin") == ("*" if origins == "*" else None)


def test_a_body_that_does_not_arrive_in_time() -> None:
    sent: list[Message] = []

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the application was called without a body")

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": []}
    asyncio.run(BodyLimit(never, 1000, seconds=0.05)(scope, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"


@pytest.fixture
def address(client: ThreadClient) -> Iterator[tuple[str, int]]:
    with running(client, Settings(max_header_bytes=2048)) as address:
        yield address


def ask(address: tuple[str, int], *parts: bytes) -> bytes:
    answer = b""
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while data := connection.recv(4096):
                answer += data
        except ConnectionError:
            pass
    return answer


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 3000 + b"\r\n\r\n"],
        [b"GET /livez?" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"A: b\r\n" * 400],
        [b"GET /livez HTTP/1.1\r\nHost: x\r\nA: ", b"a" * 3000],
    ],
    ids=["one header", "url", "many headers", "endless header"],
)
def test_headers_over_the_limit(address: tuple[str, int], parts: list[bytes]) -> None:
    answer = ask(address, *parts)
    assert answer.startswith(b"HTTP/1.1 431"), answer
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "headers_too_large"
    small = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert ask(address, small).startswith(b"HTTP/1.1 200")


def test_what_is_not_http(address: tuple[str, int]) -> None:
    answer = ask(address, b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"error"' in answer


def test_tls_files_that_do_not_work_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.pem"):
        configuration(None, Settings(ssl_certfile=str(tmp_path / "nowhere.pem")), OpenConnections())
    with pytest.raises(SettingsError, match="need --ssl-certfile"):
        configuration(None, Settings(ssl_keyfile="key.pem"), OpenConnections())
