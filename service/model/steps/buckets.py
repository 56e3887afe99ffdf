"""Sizes for which a graph is captured."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def buckets(smallest: int, growth: int, largest: int) -> list[int]:
    """smallest, smallest * growth, ... up to `largest`, which is always one of them."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= growth
    return [*sizes, largest]


def bucket(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that is enough."""
    return sizes[bisect.bisect_left(sizes, needed)]
