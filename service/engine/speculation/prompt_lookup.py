"""Prompt lookup: what followed the last tokens of a text where they occurred before is drafted again (n-grams).

No torch, no clock: the same text gives the same drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

_NGRAM_SIZES = (4, 3, 2)  # the longest match is the likeliest to go on


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
