"""How far the gate has moved from its bundle's reference profile, as population stability indices. A leaf: no torch.

    PSI = sum over bins of (a - e) ln(a / e)        a: share of the recent positions, e: share in the reference

0 is no difference; above 0.1 is commonly read as a small shift, above 0.25 as a large one. Counting costs a few
microseconds per step; the index itself is computed when it is scraped. Knows nothing about Prometheus.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from service.contract.output import GateStats

PHASES = ("prompt", "generated")
DISTRIBUTIONS = ("prompt_entropy", "generated_entropy", "top1")
_WINDOW_POSITIONS = 8192
_BLOCKS = 8  # a full window forgets in eighths
_MIN_POSITIONS = 512  # below, bins are too empty for an index: with 20 of them sampling noise alone is 20 / 512 = 0.04
_FLOOR = 1e-4  # smallest share of a bin, so that an empty one has a logarithm

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


class ProfileError(ValueError):
    """A gate profile cannot be used; the message names the field."""


class Window:
    """Counts over about the latest `_WINDOW_POSITIONS` positions, the oldest eighth dropped when a new one begins."""

    def __init__(self, bins: int) -> None:
        self._blocks: deque[Counts] = deque([np.zeros(bins, np.int64)], maxlen=_BLOCKS)
        self._newest = 0  # positions in the last block

    def add(self, counts: Counts, positions: int) -> None:
        """Counts of `positions` more positions, [bins]."""
        if self._newest >= _WINDOW_POSITIONS // _BLOCKS:
            self._blocks.append(np.zeros_like(counts))
            self._newest = 0
        self._blocks[-1] += counts
        self._newest += positions

    def total(self) -> Counts:
        """[bins]."""
        total: Counts = np.array(self._blocks).sum(axis=0)
        return total


class GateDrift:
    """Recent positions beside `gate_profile`, the reference statistics of a bundle.

    Raises ProfileError where the profile lacks a field or does not fit the experts.
    """

    def __init__(self, profile: Mapping[str, Any], experts: Sequence[str]) -> None:
        phases = [_field(profile, "phases", phase) for phase in PHASES]
        self._edges = [_numbers(_field(phase, "entropy_ratio", "edges")) for phase in phases]
        self._entropy = [_numbers(_field(phase, "entropy_ratio", "counts")) for phase in phases]
        shares = [_numbers([_field(phase, "top1_share", name) for name in experts]) for phase in phases]
        self._top1 = np.stack(shares)  # [phases, E]
        for edges, counts in zip(self._edges, self._entropy, strict=True):
            if len(counts) != len(edges) - 1 or len(counts) < 2 or counts.sum() <= 0 or (np.diff(edges) <= 0).any():
                raise ProfileError("entropy_ratio needs rising edges and one count fewer than edges, not all 0")
        self._maximum_nats = math.log(len(experts)) if len(experts) > 1 else math.inf
        self._entropy_windows = [Window(len(counts)) for counts in self._entropy]
        self._top1_window = Window(len(experts) + len(PHASES))  # and how many positions of each phase

    def observe(self, gate: GateStats) -> None:
        """The positions of one step."""
        positions = []
        for window, edges, raw in zip(
            self._entropy_windows, self._edges, (gate.prompt_entropy, gate.generated_entropy), strict=True
        ):
            ratio = np.frombuffer(raw, np.float32) / self._maximum_nats
            ratio = ratio[np.isfinite(ratio)]
            positions.append(len(ratio))
            if len(ratio):
                bins = np.searchsorted(edges[1:-1], ratio, side="right")  # what lies outside counts in the end bins
                window.add(np.bincount(bins, minlength=len(edges) - 1), len(ratio))
        if any(gate.top1):
            self._top1_window.add(np.array([*gate.top1, *positions], np.int64), sum(positions))

    def index(self, distribution: str) -> float:
        """PSI of one of DISTRIBUTIONS; NaN below `_MIN_POSITIONS` positions."""
        if distribution == "top1":
            counts = self._top1_window.total()
            actual, phases = counts[: -len(PHASES)], counts[-len(PHASES) :]
            # The reference has the window's own mix of phases: long prompts are not drift.
            return _index(actual, phases @ self._top1)
        phase = DISTRIBUTIONS.index(distribution)
        return _index(self._entropy_windows[phase].total(), self._entropy[phase])


def _index(actual: Counts, expected: Shares) -> float:
    if actual.sum() < _MIN_POSITIONS or expected.sum() <= 0:
        return math.nan
    a, e = (np.maximum(counts / counts.sum(), _FLOOR) for counts in (actual, expected))
    return float(((a - e) * np.log(a / e)).sum())


def _field(profile: Mapping[str, Any], *path: str) -> Any:
    found: Any = profile
    for depth, name in enumerate(path):
        if not isinstance(found, Mapping) or name not in found:
            raise ProfileError(f"{'.'.join(path[: depth + 1])} is missing")
        found = found[name]
    return found


def _numbers(values: Any) -> Shares:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.array(math.nan)
    if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any():
        raise ProfileError(f"expected a list of numbers that are not negative, found {values!r:.80}")
    return array
