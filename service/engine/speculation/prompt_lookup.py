"""Prompt lookup decoding: drafts the tokens that followed an earlier occurrence of a text's last n-gram.

No torch, no clock: the same text gives the same drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

_NGRAM_SIZES = (4, 3, 2)  # the longest match first: it is the likeliest to continue


class NgramIndex:
    """An index of a text's n-grams by what followed them. The text is a list that only grows; it is indexed once."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its latest occurrence
        self._indexed = 0  # n-grams that end at or before this position are indexed

    def repeats(self, drafts: Sequence[int]) -> bool:
        """Whether the last two tokens of the text + `drafts` occurred in the text before, so that drafts can follow."""
        self._index()
        return (*self._tokens[-2:], *drafts)[-2:] in self._after

    def continuation(self, drafts: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens to follow the text + `drafts`; none where its last two tokens are new.

        Where the copy reaches the end of the text, it goes on with the tokens that it has just copied.
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
        """Indexes new n-grams, except those at the very end, which nothing follows yet."""
        tokens = self._tokens
        for end in range(self._indexed + 1, len(tokens)):
            for size in _NGRAM_SIZES:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
