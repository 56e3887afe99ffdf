"""The pages as files: headers, caching, and nothing that would need another host or a looser policy. No browser."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.api.routes import web

NAMES = sorted(path.relative_to(web.FILES).as_posix() for path in web.FILES.rglob("*") if path.is_file())
PACKAGED = {"swagger-ui.css", "swagger-ui-bundle.js", "redoc.standalone.js"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"


@pytest.fixture
def http() -> TestClient:
    app = FastAPI(docs_url=None, redoc_url=None)
    web.install(app)
    return TestClient(app)


def test_every_reference_between_the_files_exists() -> None:
    named = set(web.PAGES.values())
    for name in NAMES:
        text = (web.FILES / name).read_text()
        named |= set(re.findall(r'(?:src|href)="web/([^"]+)"', text))
        imported = re.findall(r'(?:from|import) "(\.{1,2}/[^"]+)"', text)
        named |= {posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) for path in imported}
    assert named == set(NAMES) | PACKAGED


def test_folders_and_files_stay_small() -> None:
    folders = {posixpath.dirname(name) for name in NAMES}
    assert max(sum(posixpath.dirname(name) == folder for name in NAMES) for folder in folders) <= 14
    assert {name for name in NAMES if (web.FILES / name).read_text().count("\n") > 300} == set()


def test_pages_and_files_have_the_policy(http: TestClient) -> None:
    for path in ("/", "/docs", *(f"/web/{name}" for name in (*NAMES, *PACKAGED) if name != "redoc.html")):
        answer = http.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200
        assert policy.startswith(POLICY)
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.match(r"text/html|text/css|(text|application)/javascript|image/svg", answer.headers["content-type"])


def test_redoc_may_style_itself_and_nothing_more(http: TestClient) -> None:
    policy = http.get("/redoc").headers["content-security-policy"]
    assert (
        policy.replace(" 'unsafe-inline'", "").removesuffix("; worker-src blob:")
        == http.get("/").headers["content-security-policy"]
    )
    assert policy.count("unsafe") == 1


def test_unchanged_files_are_not_sent_again(http: TestClient) -> None:
    for path in ("/", "/docs", "/web/redoc.standalone.js"):
        first = http.get(path)
        again = http.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert first.headers["cache-control"] == again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path", ["/web/", "/web/none.js", "/web/form/", "/web/../api/app.py", "/web/%2e%2e/api/app.py", "/web/core.py"]
)
def test_nothing_else_is_served(http: TestClient, path: str) -> None:
    assert http.get(path).status_code == 404


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(".svg")])
def test_no_other_host_and_no_inline_code(name: str) -> None:
    text = (web.FILES / name).read_text()
    assert not re.findall(r"https?://", text)
    assert not re.findall(r"<script>|<style|\son\w+=|\sstyle=|innerHTML|\beval\(", text)


def test_examples_are_what_the_bundle_has(tmp_path: Path) -> None:
    """Prompts with their domains; a file that is none of ours, or none at all, is no example."""
    path = tmp_path / "examples.json"
    assert web.read_examples(tmp_path) == []
    path.write_text('[{"domain": "math", "prompt": "1 + 1", "answer": "2"}, {"prompt": "b"}, {"prompt": 5}, "c"]')
    assert web.read_examples(tmp_path) == [{"domain": "math", "prompt": "1 + 1"}, {"prompt": "b"}]
    for content in (b"{}", b"\xff", b"[" * 100_000, b"[]" + b" " * web.MAX_EXAMPLES_BYTES):
        path.write_bytes(content)
        assert web.read_examples(tmp_path) == []
