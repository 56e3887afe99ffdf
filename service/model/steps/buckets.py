"""Buckets: the sizes that CUDA graphs are captured for."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def buckets(smallest: int, growth: int, largest: int) -> list[int]:
    """The sizes smallest, smallest * growth, ... and, as the last, `largest`."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= growth
    return [*sizes, largest]


def bucket(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that is at least `needed`."""
    return sizes[bisect.bisect_left(sizes, needed)]
