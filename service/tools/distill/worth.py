"""The worth of drafts: from their agreement at each depth to forwards per token (DESIGN section 3.1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_LEAST_GAIN = 0.005  # forwards per token that one more depth must save: it costs rows and a run of the layer


def forwards_per_token(agreement: Sequence[float]) -> float:
    """Forwards of the model per token, by the shares of right drafts at each depth where those before were right."""
    first, *deeper = agreement
    accepted = 1 + sum(itertools.accumulate(deeper, lambda before, share: before * share))  # tokens of a full forward
    all_right = math.prod(agreement)
    if all_right == 1:
        return 1 / accepted
    full = first / (1 - all_right)  # forwards between misses
    return (2 + full) / (1 + full * accepted)


def useful_depth(agreement: Sequence[float]) -> int:
    """The depth up to which every further one saves forwards."""
    values = [forwards_per_token(agreement[:depth]) for depth in range(1, len(agreement) + 1)]
    falls = itertools.takewhile(lambda pair: pair[0] - pair[1] >= _LEAST_GAIN, itertools.pairwise(values))
    return 1 + sum(1 for _ in falls)
