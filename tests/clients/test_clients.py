"""What docs/clients.md says of clients is so. Their packages are installed, where they can be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.matrix import DOCUMENT, Client, NotToBeHadError, clients, run
from tests.support.server_process import Server, server


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    with server("--threads", "1") as running:
        yield running


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIENT_ENVIRONMENTS keeps them for the next time."""
    kept = os.environ.get("CLIENT_ENVIRONMENTS")
    return Path(kept) if kept else tmp_path_factory.mktemp("clients")


@pytest.mark.slow
@pytest.mark.parametrize("client", clients(), ids=lambda client: client.name)
def test_a_client_does_all_that_it_can(client: Client, environments: Path, demo: Server) -> None:
    try:
        found = run(client, environments, demo.port)
    except NotToBeHadError as error:
        pytest.skip(f"{client.name}: {error}")
    assert {"chat", "streaming", "structured answer"} <= found.keys()
    assert {name: reason for name, reason in found.items() if reason is not None} == {}


@pytest.mark.parametrize("client", clients(), ids=lambda client: client.name)
def test_the_document_is_about_these_versions(client: Client) -> None:
    text = DOCUMENT.read_text()
    [line] = [line for line in text.splitlines() if line.startswith(f"| {client.title} | {client.version} ")]
    assert "no:" not in line
    assert not client.setting or f"**{client.title}**: {client.setting}" in text
