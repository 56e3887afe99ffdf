"""Which known name a misspelt one was meant to be.

Names are compared word by word: as whole texts `min_tokens` and `max_tokens` are as close as any typing mistake, and
mean the opposite. So words of up to three letters must be equal, and longer ones may differ by a letter or two, but not
in the first, which keeps `include` apart from `exclude`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_MAX_CHARACTERS = 60  # of a name that is looked at: callers may send megabytes
_MIN_PREFIX = 3  # letters of an abbreviated word


def likely(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a misspelling or an abbreviation of; None where there is none, or no single one."""
    words = _words(name[:_MAX_CHARACTERS])
    if not words:
        return None
    by_words = {one: _words(one) for one in known}
    joined = [one for one, others in by_words.items() if "".join(others) == "".join(words)]
    if joined:  # topK and top_k
        return joined[0]
    distances = {one: _distance_of_words(words, others) for one, others in by_words.items()}
    found = {one: distance for one, distance in distances.items() if distance is not None}
    if found:
        nearest = [one for one, distance in found.items() if distance == min(found.values())]
        return nearest[0] if len(nearest) == 1 else None
    shortened = [one for one, others in by_words.items() if _abbreviates(words, others)]
    return shortened[0] if len(shortened) == 1 else None


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


def _distance_of_words(words: list[str], others: list[str]) -> int | None:
    """Letters that differ, over all words; None where the names have other words."""
    if len(words) != len(others):
        return None
    distances = [_distance(one, other) for one, other in zip(words, others, strict=True)]
    if any(one[0] != other[0] for one, other in zip(words, others, strict=True)):
        return None
    if any(distance > _allowed(other) for distance, other in zip(distances, others, strict=True)):
        return None
    return sum(distances)


def _allowed(word: str) -> int:
    """How many letters may differ."""
    return 0 if len(word) < 4 else 1 if len(word) < 7 else 2


def _abbreviates(words: list[str], others: list[str]) -> bool:
    """Whether the words begin those of the other name, as in `freq_penalty`, or `max_length` those of `max_len`."""
    return len(words) <= len(others) and all(
        one == other or (min(len(one), len(other)) >= _MIN_PREFIX and (other.startswith(one) or one.startswith(other)))
        for one, other in zip(words, others, strict=False)
    )


def _distance(one: str, other: str) -> int:
    """Letters to insert, delete, replace or swap with their neighbour (optimal string alignment)."""
    before, row = [], list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
