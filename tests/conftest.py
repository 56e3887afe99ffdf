"""What every test shares: an offline, hermetic environment, and the outside tools some tests need."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for variable in [name for name in os.environ if name.startswith("XLORA_")]:
    del os.environ[variable]

# The files that take longest, of all the tests' seconds two thirds: begun first, so that at the end, when one of two
# workers has no file left, the other's last one is short (`make test` has --no-loadscope-reorder for it).
LONGEST = (
    "model/test_parity.py",
    "engine/test_greedy_parity.py",
    "engine/test_engine.py",
    "model/test_tensor_parallel.py",
    "engine/test_group.py",
    "engine/test_memory.py",
    "engine/test_steering.py",
    "e2e/test_lifecycle.py",
    "e2e/test_faults.py",
    "e2e/test_chaos.py",
    "e2e/test_replicas.py",
    "e2e/test_tensor_parallel.py",
    "e2e/test_fuzz.py",
    "api/test_steering.py",
    "repo/test_readme.py",
    "engine/test_native.py",
    "engine/test_speculation.py",
    "engine/test_prefix_cache.py",
    "model/test_families.py",
    "test_cli.py",
    "engine/test_freeze.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of LONGEST come first, in that order."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    assert all(path.exists() for path in ranks), "LONGEST names a file that is gone"
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def promtool() -> str:
    """Path of Prometheus's own checker; tests that need it are skipped where it is not installed."""
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return path
