"""What every test shares: an offline, hermetic environment, and the outside tools some tests need."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.support.server_process import Server, server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the engine's own process
for variable in [name for name in os.environ if name.startswith("XLORA_")]:
    del os.environ[variable]

# A job in the background ignores Ctrl-C, and what it starts inherits that. Who handles it starts others that do not.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def promtool() -> str:
    """Path of Prometheus's own checker; tests that need it are skipped where it is not installed."""
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return path


@pytest.fixture(scope="session")
def amtool() -> str:
    """Path of Alertmanager's own checker; tests that need it are skipped where it is not installed."""
    path = shutil.which("amtool")
    if path is None:
        pytest.skip("amtool is not installed (Debian: apt-get install prometheus-alertmanager)")
    return path


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    """The demo behind the real server, for tests that leave it as it is; a worker of the run starts it once."""
    with server("--threads", "1") as running:
        yield running
