"""Who drafts, and how often each has been right.

A draft is a token with a likelihood: the share of right ones among the recent drafts of its kind whose predecessors
were right. There are two sources: the scaling pass with what looks further ahead of it (lookahead, one drafter per
depth), and earlier text (prompt lookup). How many drafts that is worth: costs.py.

No torch, no clock: the same history gives the same drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_WEIGHT = 1 / 8  # of the latest draft in a record
_WEIGHT_OF_ALL = 1 / 64  # ... of all sequences
_MIN_FIRST_RATE = 0.3
_PROBE_TOKENS = 32  # a drafter that does not pay tries again after so many tokens

# In the place of a draft that a prediction is compared with.
NO_DRAFT = -1  # there is none: it differs from every token
ANY_TOKEN = -2  # one that a prediction does not overrule


class Record:
    """How often drafts of a kind have been right lately: in one sequence, or (`of_all`) in those of an engine, which
    tells what to expect in the next one.
    """

    __slots__ = ("of_all", "rate", "used_at")

    def __init__(self, rate: float, used_at: int = 0, of_all: Record | None = None) -> None:
        self.rate = rate  # what is expected of the first one
        self.used_at = used_at  # tokens of the sequence when it last drafted
        self.of_all = of_all

    def begin(self, used_at: int) -> Record:
        """The record of another sequence, of so many tokens. However bad this one is, a few drafts are tried."""
        return Record(max(self.rate, _MIN_FIRST_RATE), used_at, self)

    def judge(self, right: bool) -> None:
        """A draft whose predecessors were right has been compared with what was sampled."""
        self.rate += _WEIGHT * (right - self.rate)
        if self.of_all is not None:
            self.of_all.rate += _WEIGHT_OF_ALL * (right - self.of_all.rate)

    def is_idle(self, tokens: int) -> bool:
        """Whether it has not drafted for so long that it may try, whatever its record says."""
        return tokens - self.used_at >= _PROBE_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class Drafter:
    """One source of drafts in one sequence, at one depth: how far a draft is from what it was made of."""

    record: Record
    depth: int  # from 1 on
    is_lookup: bool = False


def expected(rates: Iterable[float]) -> float:
    """The mean number of drafts that are right, of some that stand one after another."""
    likelihood, total = 1.0, 0.0
    for rate in rates:
        likelihood *= rate
        total += likelihood
    return total
