"""A few hundred cases of schemathesis, of paths and headers, and of connections; `make fuzz` runs thousands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fuzz.bodies import fuzz_bodies
from tests.fuzz.connections import BEHAVIOURS, fuzz_connections
from tests.fuzz.paths import ADMIN, KEY, fuzz_paths
from tests.support.server_process import server

pytestmark = pytest.mark.slow


def test_no_case_finds_a_5xx_or_an_undocumented_answer(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys, and all checks: status, headers, schema, rejection of bad data, ignored authorization."""
    monkeypatch.setenv("XLORA_API_KEYS", KEY)
    with server("--model", str(tiny_bundle), "--threads", "1", "--max-model-len", "128") as running:
        finished = fuzz_bodies(running, 8, "--phases", "examples,fuzzing,stateful", "--seed", "1")
        assert finished.returncode == 0, finished.stdout[-8000:]
        tested = re.search(r"(\d+) generated, \1 passed", finished.stdout)
        assert tested is not None
        assert int(tested[1]) >= 100
        assert running.get("/readyz")[0] == 200


def test_no_path_or_header_opens_what_is_closed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLORA_API_KEYS", KEY)
    monkeypatch.setenv("XLORA_ADMIN_KEYS", ADMIN)
    with server("--model", str(tiny_bundle), "--threads", "1", "--max-model-len", "128") as running:
        statuses, found = fuzz_paths(running, seconds=30, seed=1, most=500)
    assert found == []
    assert statuses.total() >= 100
    assert {"200", "400", "401", "404", "405"} <= set(statuses)


def test_connections_that_misbehave_leave_nothing_behind(tiny_bundle: Path) -> None:
    seen = fuzz_connections("--model", str(tiny_bundle), count=250, seconds=20, seed=1)
    assert seen.keys() == {one.__name__ for one in BEHAVIOURS}
