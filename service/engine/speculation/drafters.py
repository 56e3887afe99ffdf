"""Drafters, their acceptance rates, and the rate from which on a draft is worth its rows.

A draft's acceptance rate is the fraction of recent drafts of its kind that were right, among those whose predecessors
were right. There are two sources of drafts: lookahead (the scaling pass and the draft layer behind it, one drafter per
depth) and prompt lookup (earlier text).

A step costs `fixed + per_row * rows`. A draft that is kept saves its sequence a step, that is, the fixed cost divided
by the number of sequences; one that is dropped has cost its rows; a run of the draft layer costs `layer_cost * fixed`,
for all sequences together. So with probability p of being kept, a draft pays while

    p * fixed / sequences  >  (1 - p) * per_row * rows + layer_cost * fixed / sequences
    <=>  p  >  (x + layer_cost) / (1 + x),      x = rows * sequences * row_cost,      row_cost = per_row / fixed

No torch, no clock: the same history gives the same drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_WEIGHT = 1 / 8  # of the latest draft in a sequence's record
_WEIGHT_OF_ALL = 1 / 64  # of the latest draft in the record over all sequences
_MIN_FIRST_RATE = 0.3
_PROBE_TOKENS = 32  # a drafter that does not pay is tried again after this many tokens

# Expected tokens that are no tokens (ScheduledSequence.expected).
NO_DRAFT = -1  # there is no draft: every prediction differs
ANY_TOKEN = -2  # the draft stands, whatever is predicted


@dataclass(frozen=True, slots=True)
class StepCost:
    """Costs relative to the fixed cost of a step (step_cost.py measures them)."""

    row: float = 0.0  # one more row; 0: drafts are free
    layer: float = 0.0  # one run of the draft layer


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Probabilities of being right from which on one more draft of a sequence pays, by what a wrong one costs."""

    one_row: float  # a row of one stream
    two_rows: float  # a row of both streams
    layer: float  # a row of both streams, and a run of the draft layer

    @classmethod
    def of(cls, cost: StepCost, sequences: int) -> BreakEven:
        """The break-even probabilities in a step of `sequences` sequences."""
        one, two = cost.row * sequences, 2 * cost.row * sequences
        return cls(one / (1 + one), two / (1 + two), (two + cost.layer) / (1 + two))


class Record:
    """The recent acceptance rate of one kind of drafts: in one sequence, or over all sequences of an engine (then it is
    the `of_all` of the sequences' records, and new sequences begin with its rate).
    """

    __slots__ = ("of_all", "rate", "used_at")

    def __init__(self, rate: float, used_at: int = 0, of_all: Record | None = None) -> None:
        self.rate = rate
        self.used_at = used_at  # length of the sequence when it last drafted
        self.of_all = of_all

    def begin(self, used_at: int) -> Record:
        """The record of a new sequence of `used_at` tokens. Its rate is high enough that a few drafts are tried."""
        return Record(max(self.rate, _MIN_FIRST_RATE), used_at, self)

    def update(self, right: bool) -> None:
        """Counts a draft that was compared with its sampled token; its predecessors were right."""
        self.rate += _WEIGHT * (right - self.rate)
        if self.of_all is not None:
            self.of_all.rate += _WEIGHT_OF_ALL * (right - self.of_all.rate)

    def is_idle(self, tokens: int) -> bool:
        """Whether it has not drafted for so long that it may be tried whatever its rate."""
        return tokens - self.used_at >= _PROBE_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class Drafter:
    """One source of drafts in one sequence, at one depth, with its record. Depths of prompt lookup share a record."""

    record: Record
    depth: int  # a draft's distance from the last token it was made from, at least 1
    is_lookup: bool = False


def paying(rates: Iterable[float], likelihood: float, needed: Iterable[float]) -> int:
    """The number of consecutive drafts with these rates that pay, after drafts that are all right with `likelihood`."""
    count = 0
    for rate, minimum in zip(rates, needed, strict=False):
        likelihood *= rate
        if likelihood < minimum:
            break
        count += 1
    return count


def expected(rates: Iterable[float]) -> float:
    """The expected number of right drafts among consecutive ones with these rates."""
    likelihood, total = 1.0, 0.0
    for rate in rates:
        likelihood *= rate
        total += likelihood
    return total
