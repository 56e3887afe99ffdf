"""How many threads compute: by cores, by a container's limit, by what the options say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.contract.options import EngineOptions
from service.engine import cgroups
from service.engine.threads import default_threads, resolve_threads

NO_LIMIT = "max 100000\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Four cores and no limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cgroups, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "_OWN_CGROUPS", tmp_path / "own")
    return monkeypatch


def limit(text: str, own: str = "0::/", name: str = "cpu.max") -> None:
    """The kernel's files, as a process in this cgroup sees them."""
    path = cgroups._CGROUPS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    cgroups._OWN_CGROUPS.write_text(own)


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
    ("own", "folder", "quota", "expected"),
    [
        ("4:cpu,cpuacct:/docker/x\n0::/", "cpu,cpuacct", "200000", 1),  # a container that sees its own as the root
        ("4:cpu,cpuacct:/pod/x", "cpu/pod", "300000", 2),  # a limit further out
        ("1:cpu:/", "cpu", "-1", 3),
        ("1:cpuacct:/", "cpu", "200000", 3),  # of a controller that this process is not in
    ],
)
def test_v1_s_quota_is_a_limit_too(
    machine: pytest.MonkeyPatch, own: str, folder: str, quota: str, expected: int
) -> None:
    limit("100000\n", own, f"{folder}/cpu.cfs_period_us")
    limit(f"{quota}\n", own, f"{folder}/cpu.cfs_quota_us")
    assert default_threads() == expected


def test_the_smallest_limit_of_several_counts(machine: pytest.MonkeyPatch) -> None:
    limit("200000 100000\n", "0::/pod/x", "pod/cpu.max")
    limit("max 100000\n", "0::/pod/x", "pod/x/cpu.max")
    assert default_threads() == 1


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
def test_a_thread_with_idle_priority_where_nobody_has_said_how_many(
    machine: pytest.MonkeyPatch, cpu_max: str, options: dict[str, int], expected: tuple[int, int]
) -> None:
    limit(cpu_max)
    assert resolve_threads(EngineOptions("", **options)) == expected  # type: ignore[arg-type]


def test_no_thread_with_idle_priority_on_a_single_core(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(os, "sched_getaffinity", lambda _: {0})
    assert resolve_threads(EngineOptions("")) == (1, 0)
