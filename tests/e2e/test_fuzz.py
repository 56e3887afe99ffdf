"""A few hundred cases of schemathesis; `make fuzz` runs thousands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fuzz import KEY, fuzz
from tests.server_process import server


def test_no_case_finds_a_5xx_or_an_undocumented_answer(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys, and all checks: status, headers, schema, rejection of bad data, ignored authorization."""
    monkeypatch.setenv("XLORA_API_KEYS", KEY)
    with server("--model", str(tiny_bundle), "--threads", "1", "--max-model-len", "128") as running:
        finished = fuzz(running, 8, "--phases", "examples,fuzzing,stateful", "--seed", "1")
        assert finished.returncode == 0, finished.stdout[-8000:]
        tested = re.search(r"(\d+) generated, \1 passed", finished.stdout)
        assert tested is not None
        assert int(tested[1]) >= 100
        assert running.get("/readyz")[0] == 200
