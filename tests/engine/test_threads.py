"""How many threads compute: by cores, by a container's limit, by what the options say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.contract.options import EngineOptions
from service.engine import threads
from service.engine.threads import default_threads, resolve_threads

NO_LIMIT = "max 100000\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Four cores and no limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "_CPU_MAX", tmp_path / "cpu.max")
    return monkeypatch


def limit(text: str) -> None:
    threads._CPU_MAX.write_text(text)


@pytest.mark.parametrize(
    ("cpu_max", "ranks", "expected"),
    [
        (None, 1, 3),
        (NO_LIMIT, 1, 3),
        (NO_LIMIT, 2, 1),
        (NO_LIMIT, 8, 1),
        ("200000 100000\n", 1, 1),
        ("250000 100000\n", 1, 2),
        ("50000 100000\n", 1, 1),
        ("6400000 100000\n", 1, 3),
        ("nonsense", 1, 3),
        ("abc 100000", 1, 3),
    ],
)
def test_all_cores_but_one(machine: pytest.MonkeyPatch, cpu_max: str | None, ranks: int, expected: int) -> None:
    if cpu_max is not None:
        limit(cpu_max)
    assert default_threads(ranks) == expected


@pytest.mark.parametrize(
    ("cpu_max", "options", "expected"),
    [
        (NO_LIMIT, {}, (3, 1)),
        (NO_LIMIT, {"threads": 3}, (3, 0)),
        (NO_LIMIT, {"threads": 8}, (8, 0)),
        (NO_LIMIT, {"tensor_parallel": 2}, (1, 0)),
        ("400000 100000\n", {}, (3, 1)),
        ("200000 100000\n", {}, (1, 0)),
    ],
)
def test_a_guest_where_nobody_has_said_how_many(
    machine: pytest.MonkeyPatch, cpu_max: str, options: dict[str, int], expected: tuple[int, int]
) -> None:
    limit(cpu_max)
    assert resolve_threads(EngineOptions("", **options)) == expected  # type: ignore[arg-type]


def test_no_guest_on_a_single_core(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(os, "sched_getaffinity", lambda _: {0})
    assert resolve_threads(EngineOptions("")) == (1, 0)
