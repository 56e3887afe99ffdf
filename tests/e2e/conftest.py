"""A tiny random bundle behind the real server, shared by the tests that do not end it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bundles import make_bundle
from tests.support.server_process import Server, server


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("e2e") / "tiny", xlora={"layerwise_scalings": True, "xlora_depth": 2})


@pytest.fixture(scope="session")
def tiny_server(tiny_bundle: Path) -> Iterator[Server]:
    with server("--model", str(tiny_bundle), "--threads", "1") as running:
        yield running
