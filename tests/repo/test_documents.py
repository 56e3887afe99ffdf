"""What the README and docs/ show: commands run and print what stands there, tables are those of the code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from docs import reference
from tests.support.documents import DOCUMENTS, ROOT, Example, Workspace, examples, is_as_printed
from tests.support.server_process import Server, free_port, server
from tests.support.waiting import wait_for

_INSTALL_SECONDS = 3600
_ALL = [example for document in DOCUMENTS for example in examples(document)]
_RUN = [example for example in _ALL if not example.not_run]


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    with server("--threads", "1") as running:
        yield running


def is_quick(example: Example) -> bool:
    """Requests to a running server, and the README's own scripts that print something."""
    is_script = example.document == "README.md" and example.language == "python"
    return not example.loads_a_model or (is_script and example.printed is not None)


def check(example: Example, workspace: Workspace) -> None:
    printed = workspace.run(example)
    if example.printed is not None:
        assert is_as_printed(printed, example.printed), f"{example} prints:\n{printed}\nand not:\n{example.printed}"


def test_quick_examples_print_what_the_documents_say(demo: Server, tmp_path: Path, subtests: pytest.Subtests) -> None:
    workspace = Workspace.like_a_checkout(tmp_path, demo.port)
    assert len(list(filter(is_quick, _RUN))) >= 15
    for example in filter(is_quick, _RUN):
        with subtests.test(str(example)):
            check(example, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_all_examples_print_what_the_documents_say(
    document: str, demo: Server, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """One folder for each document: later examples use what earlier ones have written."""
    workspace = Workspace.like_a_checkout(tmp_path, demo.port)
    for example in _RUN:
        if example.document == document:
            with subtests.test(str(example)):
                check(example, workspace)


@contextmanager
def made_server(clone: Path, port: int, *variables: str) -> Iterator[None]:
    """`make serve` as the README says it, until it is ready."""
    line = ["make", "serve", f"PORT={port}", *variables]
    with subprocess.Popen(line, cwd=clone, start_new_session=True) as process:
        try:
            assert wait_for(lambda: is_ready(port) or process.poll() is not None, _INSTALL_SECONDS)
            assert process.poll() is None
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def is_ready(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_fresh_clone_needs_nothing_but_what_the_readme_installs(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """PIP_ARGS of the environment goes to make, for machines that have an index of their own."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    port = free_port()
    workspace = Workspace(clone, port)
    with made_server(clone, port):
        for example in examples("README.md"):
            installs = "pip install" in example.text
            if not example.not_run or installs:
                with subtests.test(str(example)):
                    check(example, workspace)
    with made_server(clone, port, "MODEL=my-model"):
        assert b"my-model" in urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").read()
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert changed.stdout == ""


def test_examples_that_no_test_runs_have_a_reason() -> None:
    """Every block that looks like a command is one of those that run, or of those that say why not."""
    for document in DOCUMENTS:
        languages = set(re.findall(r"^```(\w*)$", (ROOT / document).read_text(), re.MULTILINE)) - {""}
        assert languages <= {"sh", "python", "text", "json"}, document
        shown = re.findall(r"^```text\n\$ ", (ROOT / document).read_text(), re.MULTILINE)
        assert shown == [], f"{document}: a command in a text block; let a block of sh stand before it"


def test_an_output_is_compared_line_by_line() -> None:
    """Negative controls: other words and numbers fail, ids, rates and rounding do not count, dots stand for lines."""
    assert is_as_printed("a\nb\nc\n", "a\n...\n")
    assert is_as_printed("gen-0123456789abcdef0123456789abcdef 5 tokens/s\n", f"gen-{'f' * 32} 6.1 tokens/s\n")
    assert is_as_printed("a,0.850536883\n", "a,0.850536829\n")
    assert not is_as_printed("a,0.850636883\n", "a,0.850536883\n")
    assert not is_as_printed("a\nb\n", "a\n")
    assert not is_as_printed("Sum: 135\n", "Sum: 136\n")


@pytest.mark.parametrize("document", reference.TABLES)
def test_the_tables_are_those_of_the_code(document: str) -> None:
    assert reference.written(document) == (ROOT / "docs" / document).read_text(), "run: python docs/reference.py"


def test_a_stale_table_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.DEFAULTS, ("gate", "temperature"), "something else")
    assert reference.written("api.md") != (ROOT / "docs/api.md").read_text()


def test_every_setting_has_a_subject() -> None:
    named = [name for names in reference.SUBJECTS.values() for name in names]
    assert sorted(named) == sorted(reference.Settings.model_fields)
