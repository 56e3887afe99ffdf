"""How many threads an engine computes with on a CPU."""

from __future__ import annotations

import math
import os
from pathlib import Path

from service.contract.options import EngineOptions
from service.engine.cgroups import own_cgroups


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
    """How many cores' time there is: the least that a cgroup around this process grants, or all cores."""
    granted = (_granted(version, folder) for version, folder in own_cgroups("cpu"))
    return min(filter(None, granted), default=_cores())


def _granted(version: int, folder: Path) -> float | None:
    """Cores' time of one cgroup, as microseconds of computing in a period; None where it has no limit."""
    try:
        if version == 1:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        limit = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None  # not this process's to see, or v2's "max"
    return limit if limit > 0 else None  # v1's -1
