"""How many threads an engine computes with on a CPU."""

from __future__ import annotations

import math
import os
from pathlib import Path

from service.contract.options import EngineOptions

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds it may compute, of how many


def resolve_threads(options: EngineOptions) -> tuple[int, int]:
    """How many threads compute, and how many more help where a core has nothing else to do: unless the options say how
    many, one on the last core, which is the API process's; not under a limit on CPU time, where its waiting counts.
    """
    ranks = options.tensor_parallel
    has_guest = options.threads is None and ranks == 1 and 1 < _cores() <= _limit()
    return options.threads or default_threads(ranks), int(has_guest)


def default_threads(ranks: int = 1) -> int:
    """All cores but one: the API process needs it, and torch's threads wait for each other (DECISIONS.md). Each of
    several ranks has an equal share.
    """
    return max(1, (min(_cores(), math.ceil(_limit())) - 1) // ranks)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _limit() -> float:
    """How many cores' time there is, as the kernel grants it (cgroup v2)."""
    try:
        quota, period = _CPU_MAX.read_text().split()
        return _cores() if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return _cores()
