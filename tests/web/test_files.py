"""The page as files: headers, caching, and nothing that would need another host or a looser policy. No browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.api.routes import web

NAMES = sorted(path.name for path in web.FILES.iterdir())


@pytest.fixture
def http() -> TestClient:
    app = FastAPI()
    web.install(app)
    return TestClient(app)


def test_every_reference_between_the_files_exists() -> None:
    text = {path.name: path.read_text() for path in web.FILES.iterdir()}
    named = set(re.findall(r'(?:src|href)="web/([^"]+)"', text["index.html"]))
    for name in NAMES:
        named |= set(re.findall(r'from "\./([^"]+)"', text[name]))
    assert named | {"index.html"} == set(NAMES)


def test_page_and_files_have_the_policy(http: TestClient) -> None:
    for path in ("/", *(f"/web/{name}" for name in NAMES)):
        answer = http.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.match(r"text/html|text/css|(text|application)/javascript|image/svg", answer.headers["content-type"])


def test_unchanged_files_are_not_sent_again(http: TestClient) -> None:
    first = http.get("/")
    again = http.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/web/", "/web/none.js", "/web/../api/app.py", "/web/%2e%2e/api/app.py"])
def test_nothing_else_is_served(http: TestClient, path: str) -> None:
    assert http.get(path).status_code == 404


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(".svg")])
def test_no_other_host_and_no_inline_code(name: str) -> None:
    text = Path(web.FILES / name).read_text()
    assert not re.findall(r"https?://", text)
    assert not re.findall(r"<script>|<style|\son\w+=|\sstyle=|innerHTML|\beval\(", text)
