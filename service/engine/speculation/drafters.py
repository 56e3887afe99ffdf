"""Drafters, and their acceptance rates.

A draft's acceptance rate is the fraction of recent drafts of its kind that were right, among those whose predecessors
were right. There are two sources of drafts: lookahead (the scaling pass and the draft layer behind it, one drafter per
depth) and prompt lookup (earlier text). costs.py decides how many drafts pay.

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

    def is_idle(self, tokens: int, sequences: int = 1) -> bool:
        """Whether it has not drafted for so long that it may be tried whatever its rate. What a try costs the steps of
        all `sequences`, each of them tries so much more seldom.
        """
        return tokens - self.used_at >= _PROBE_TOKENS * sequences


@dataclass(frozen=True, slots=True, eq=False)
class Drafter:
    """One source of drafts in one sequence, at one depth, with its record. Depths of prompt lookup share a record."""

    record: Record
    depth: int  # a draft's distance from the last token it was made from, at least 1
    is_lookup: bool = False


def expected(rates: Iterable[float]) -> float:
    """The expected number of right drafts among consecutive ones with these rates."""
    likelihood, total = 1.0, 0.0
    for rate in rates:
        likelihood *= rate
        total += likelihood
    return total
