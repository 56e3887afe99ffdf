"""The number of threads that an engine computes with on a CPU, by cores, cgroup limits and options."""

from __future__ import annotations

import math
import os
from pathlib import Path

from service.contract.options import EngineOptions
from service.engine.cgroups import own_cgroups


def resolve_threads(options: EngineOptions) -> tuple[int, int]:
    """The number of compute threads, and of threads with idle priority, which help while their core has nothing to do.

    Without --threads, there is one with idle priority for the last core, which is left to the API process. Under a
    limit on CPU time there is none, because its polling would count against the limit.
    """
    ranks = options.tensor_parallel
    has_idle_priority = options.threads is None and ranks == 1 and 1 < _cores() <= _limit()
    return options.threads or default_threads(ranks), int(has_idle_priority)


def default_threads(ranks: int = 1) -> int:
    """All cores but one, divided by the number of ranks. The API process needs the other core: torch's threads wait for
    each other, so one that is descheduled stops all (DECISIONS.md).
    """
    return max(1, (min(_cores(), math.ceil(_limit())) - 1) // ranks)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _limit() -> float:
    """The CPU time available, in cores: the lowest limit of a cgroup around this process, or all cores."""
    granted = (_granted(version, folder) for version, folder in own_cgroups("cpu"))
    return min(filter(None, granted), default=_cores())


def _granted(version: int, folder: Path) -> float | None:
    """The CPU limit of one cgroup in cores (quota / period); None where it has no limit."""
    try:
        if version == 1:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        limit = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None  # the folder is not visible here, or v2's "max"
    return limit if limit > 0 else None  # v1's -1
