"""What to draft, and whether a draft is worth its rows. No torch, no clock: the same history gives the same drafts.

A step costs `fixed + per_row * rows`. A draft that is kept spares its sequence a step, which is its share of the fixed
cost; one that is dropped has cost its rows. So with probability p of being kept it pays while

    p * fixed / sequences  >  (1 - p) * per_row * rows      <=>      p > x / (1 + x),  x = rows * sequences * row_cost

where row_cost = per_row / fixed is a property of the machine (scheduler.py has it, DECISIONS.md how it was measured).
"""

from __future__ import annotations

from collections.abc import Sequence

_WEIGHT = 1 / 8  # of the latest draft in a drafter's record
_PROBE_TOKENS = 32  # a drafter that does not pay tries again after so many tokens
_NGRAM_SIZES = (4, 3, 2)  # the longest match is the likeliest to go on


def break_even(row_cost: float, sequences: int, rows: int) -> float:
    """The probability above which a draft of `rows` rows pays in a step of `sequences` sequences."""
    cost = row_cost * sequences * rows
    return cost / (1 + cost)


class Drafter:
    """The record of one way of drafting in one sequence."""

    __slots__ = ("dropped", "idle_tokens", "kept", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate  # recent share of right drafts; what is expected of the first one
        self.kept = 0  # drafts that cost rows and were right
        self.dropped = 0  # drafts that cost rows in vain
        self.idle_tokens = 0  # tokens accepted since the last draft

    def judge(self, right: bool) -> None:
        """A draft has been compared with what was sampled."""
        self.rate += _WEIGHT * (right - self.rate)

    def pays(self, likelihood: float, needed: float) -> bool:
        """Whether `length` is more than 0, where there is room."""
        return likelihood * self.rate >= needed or self.idle_tokens >= _PROBE_TOKENS

    def length(self, likelihood: float, needed: float, most: int) -> int:
        """How many more drafts pay, at most `most`, after drafts that are right with probability `likelihood`.

        `needed` is the break-even probability. A drafter that has not paid for a while is let try with one draft.
        """
        count = 0
        likelihood *= self.rate
        while count < most and likelihood >= needed:
            count += 1
            likelihood *= self.rate
        return count or min(most, int(self.idle_tokens >= _PROBE_TOKENS))


class NgramIndex:
    """Finds where the last tokens of a text have occurred before, and what followed (prompt lookup decoding).

    The text is a live list that only grows; each token is indexed once.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its latest occurrence
        self._indexed = 0  # n-grams that end before this position or at it are in

    def repeats(self, drafts: Sequence[int]) -> bool:
        """Whether the last two tokens of the text + `drafts` have occurred in it before: else nothing can be copied."""
        self._index()
        return (*self._tokens[-2:], *drafts)[-2:] in self._after

    def continuation(self, drafts: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens to follow the text + `drafts`; none where its last two tokens are new.

        A text that repeats itself is continued beyond its own end: what was copied may be copied again.
        """
        self._index()
        longest = _NGRAM_SIZES[0]
        tail = (*self._tokens[-longest:], *drafts)[-longest:]
        for size in _NGRAM_SIZES:
            start = self._after.get(tail[-size:]) if size <= len(tail) else None
            if start is not None:
                return self._copy(start, drafts, count)
        return []

    def _copy(self, start: int, drafts: Sequence[int], count: int) -> list[int]:
        known, ahead = len(self._tokens), list(drafts)
        for source in range(start, start + count):
            ahead.append(self._tokens[source] if source < known else ahead[source - known])
        return ahead[len(drafts) :]

    def _index(self) -> None:
        """Takes in every n-gram that something follows: the text's own end is not an earlier occurrence."""
        tokens = self._tokens
        for end in range(self._indexed + 1, len(tokens)):
            for size in _NGRAM_SIZES:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
