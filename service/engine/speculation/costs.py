"""How many drafts are worth their rows, by what a step costs.

    S_k            p_1 + p_2 + ... + p_k, the tokens that a step is expected to bring a sequence that drafts k deep, of
                   which the draft at depth i is right with probability p_i
    t(k)           seconds of a step in which n sequences do so: 2 k n rows, and k - 1 runs of the draft layer
    v              the least of t(k) / (n S_k): what a token costs a sequence at the best depth

One more draft at depth k is worth it if p_k v > (t(k) - t(k - 1)) / n. The first one spares a whole step if it is
right, and costs one row if it is wrong: p_1 > (t(2 n rows) - t(n rows)) / t(n rows).

No torch, no clock: step_cost.py measures.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step by its rows, linear between `points` and beyond the last; and of one run of the draft layer."""

    points: tuple[tuple[int, float], ...] = ((0, 1.0), (1, 1.0))  # (rows, seconds), ascending, at least two
    layer: float = 0.0

    @classmethod
    def linear(cls, row: float, layer: float = 0.0) -> StepCost:
        """With a fixed cost of 1."""
        return cls(((0, 1.0), (1, 1.0 + row)), layer)

    def seconds(self, rows: float) -> float:
        """Of a step with so many rows, in the mean."""
        after = min(max(1, bisect_left(self.points, (rows, 0.0))), len(self.points) - 1)
        (fewer, quick), (more, slow) = self.points[after - 1 : after + 1]
        return quick + (slow - quick) * (rows - fewer) / (more - fewer)


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Probabilities of being right from which on one more draft of a sequence pays, by depth from 1 on."""

    lookahead: list[float]  # of the scaling pass and its draft layer
    two_streams: list[float]  # of earlier text, where a wrong one costs rows of both streams
    one_stream: list[float]  # ... or of the real one alone, where the gate is frozen

    @classmethod
    def of(cls, cost: StepCost, sequences: int, rates: Sequence[float], depth: int) -> BreakEven:
        """For steps of so many sequences, whose scaling passes draft with `rates` at depth 1, 2, ...; up to `depth`."""
        deepest = max(depth, len(rates))
        both = [cost.seconds(2 * each * sequences) for each in range(deepest + 1)]
        alone = [cost.seconds(each * sequences) for each in range(deepest + 1)]
        first = (both[1] - alone[1]) / alone[1]
        brought = accumulate(accumulate(rates, mul))
        token = min((both[k] + (k - 1) * cost.layer) / max(s, 1e-9) for k, s in enumerate(brought, start=1))
        steps = [(both[k] - both[k - 1]) / token for k in range(2, deepest + 1)]
        return cls(
            [first, *(share + cost.layer / token for share in steps[: len(rates) - 1])],
            [first, *steps],
            [first, *((alone[k] - alone[k - 1]) / token for k in range(2, deepest + 1))],
        )
