"""What the machine, or the container, lets an engine have of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory in bytes, and whose it is."""

    total: int
    origin: str  # "this machine", "the container", "the GPU"


def host_memory() -> Memory:
    """The machine's memory, or the least that a cgroup around this process allows (v1 or v2)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(_cgroup_limits(), default=machine)
    return Memory(limit, "the container") if limit < machine else Memory(machine, "this machine")


def _cgroup_limits() -> Iterator[int]:
    """The limits of this process's memory cgroups, innermost first. A container may see its own cgroup as the root."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots, name = [_CGROUPS, _CGROUPS / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            roots, name = [_CGROUPS / "memory"], "memory.limit_in_bytes"
        else:
            continue
        for root in roots:
            for folder in (place := root / path.lstrip("/"), *place.parents):
                if not folder.is_relative_to(root):
                    break
                try:
                    text = (folder / name).read_text().strip()
                except OSError:
                    continue
                if text.isdecimal():  # v2 says "max" where there is none, v1 a number beyond any machine
                    yield int(text)
