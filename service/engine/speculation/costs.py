"""Decides how many drafts pay, by the cost of a step and their probabilities of being right.

    S_k            p_1 + p_2 + ... + p_k, the expected tokens per step of a sequence that drafts to depth k, where all
                   drafts up to depth i are right with probability p_i
    t(k)           seconds of a step in which n sequences do so: 2 k n rows, and k - 1 runs of the draft layer
    v              the minimum of t(k) / (n S_k): the cost of a token at the best depth

Another draft at depth k pays if p_k v > (t(k) - t(k - 1)) / n. The first one saves a whole step if it is right, and
costs one row if it is wrong: p_1 > (t(2 n rows) - t(n rows)) / t(n rows).

No torch, no clock: step_cost.py measures the costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step by its rows, interpolated linearly between `points`, and of a run of the draft layer."""

    points: tuple[tuple[int, float], ...] = ((0, 1.0), (1, 1.0))  # (rows, seconds), ascending, at least two
    layer: float = 0.0

    @classmethod
    def linear(cls, row: float, layer: float = 0.0) -> StepCost:
        """A cost of `row` per row and 1 per step."""
        return cls(((0, 1.0), (1, 1.0 + row)), layer)

    def seconds(self, rows: float) -> float:
        """Mean seconds of a step with this many rows."""
        after = min(max(1, bisect_left(self.points, (rows, 0.0))), len(self.points) - 1)
        (fewer, quick), (more, slow) = self.points[after - 1 : after + 1]
        return quick + (slow - quick) * (rows - fewer) / (more - fewer)


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Probabilities of being right from which on one more draft of a sequence pays, by depth from 1 on."""

    lookahead: list[float]  # drafts of the scaling pass and the draft layer
    two_streams: list[float]  # prompt-lookup drafts, which cost a row of both streams
    one_stream: list[float]  # prompt-lookup drafts under a frozen gate, which cost a row of the real stream
    sequences: int = 1  # in the step

    @classmethod
    def of(cls, cost: StepCost, sequences: int, rates: Sequence[float], depth: int) -> BreakEven:
        """The break-even probabilities in steps of `sequences` sequences, up to `depth`. `rates` are the acceptance
        rates of lookahead drafts at depth 1, 2, ...
        """
        max_depth = max(depth, len(rates))
        both = [cost.seconds(2 * each * sequences) for each in range(max_depth + 1)]
        alone = [cost.seconds(each * sequences) for each in range(max_depth + 1)]
        first = (both[1] - alone[1]) / alone[1]
        tokens = accumulate(accumulate(rates, mul))
        token = min((both[k] + (k - 1) * cost.layer) / max(s, 1e-9) for k, s in enumerate(tokens, start=1))
        steps = [(both[k] - both[k - 1]) / token for k in range(2, max_depth + 1)]
        return cls(
            [first, *(step + cost.layer / token for step in steps[: len(rates) - 1])],
            [first, *steps],
            [first, *((alone[k] - alone[k - 1]) / token for k in range(2, max_depth + 1))],
            sequences,
        )
