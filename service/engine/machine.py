"""Memory of the machine or the container: in all, and free. Does not know what an engine needs (memory_plan.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.engine.cgroups import own_cgroups

_LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}
_MEMINFO = Path("/proc/meminfo")
_USAGES = ("memory.current", "memory.usage_in_bytes")


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory in bytes, and the words for it in messages."""

    total: int
    origin: str  # "this machine", "the container", "the GPU"


def host_memory() -> Memory:
    """The machine's memory, or the lowest limit of a cgroup around this process (v1 or v2)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min((limit for limit, _ in _cgroups()), default=machine)
    return Memory(limit, "the container") if limit < machine else Memory(machine, "this machine")


def free_host_bytes() -> int:
    """Bytes that this process can still allocate, under the machine's memory and its cgroups' limits."""
    free = 1024 * _numbers(_MEMINFO)["MemAvailable:"]
    for limit, folder in _cgroups():
        stat = _numbers(folder / "memory.stat")
        used = next(filter(None, (_number(folder / name) for name in _USAGES)), 0)
        free = min(free, limit - used + stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(free, 0)


def _cgroups() -> Iterator[tuple[int, Path]]:
    """The limits of this process's memory cgroups with their folders, innermost first."""
    for version, folder in own_cgroups("memory"):
        if limit := _number(folder / _LIMITS[version]):
            yield limit, folder


def _number(path: Path) -> int | None:
    """The number in a file; None for v2's "max", which is no limit (v1 has a number beyond any machine)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number on each line."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {each[0]: int(each[1]) for each in words if len(each) > 1}
