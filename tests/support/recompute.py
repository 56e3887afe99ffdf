"""DESIGN section 2's numbers of one gate row, written out in numpy double precision:
what summaries are compared with.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def position_summary(row: Array) -> tuple[Array, Array, float]:
    """[S, E] -> mean over sites of g [E], of p = |g| / sum |g| [E] (0 where the sum is 0), and the entropy in nats
    or NaN.
    """
    row = row.astype(np.float64)
    shares, entropies = [], []
    for site in row:
        total = np.abs(site).sum()
        p = np.abs(site) / total if total else np.zeros_like(site)
        shares.append(p)
        if total:
            entropies.append(-sum(x * math.log(x) for x in p if x > 0))
    entropy = sum(entropies) / len(entropies) if entropies else math.nan
    return row.mean(0), np.mean(shares, axis=0), entropy
