"""Stop strings in a text that grows: found as soon as they are complete, held back while they may become so.

What a character costs depends on the strings that the text may be in the middle of, not on how many there are.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence


class Pattern:
    """One stop string, and how a text that has matched some of it goes on (Knuth, Morris and Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop

    @functools.cached_property
    def _borders(self) -> list[int]:
        """Computed where a text leaves the string in its middle, which few do."""
        borders, length = [0] * len(self.stop), 0
        for position in range(1, len(self.stop)):
            while length and self.stop[position] != self.stop[length]:
                length = borders[length - 1]
            length += self.stop[position] == self.stop[length]
            borders[position] = length
        return borders

    def advance(self, matched: int, character: str) -> int:
        """How much is matched after one more character."""
        while matched and character != self.stop[matched]:
            matched = self._borders[matched - 1]
        return matched + (character == self.stop[matched])


class Patterns:
    """The stop strings of one call, which all its choices share."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.by_first: dict[str, list[Pattern]] = defaultdict(list)
        for stop in stops:
            self.by_first[stop[0]].append(Pattern(stop))


class StopStrings:
    """Cuts a growing text before the first of some strings.

    `push` returns the text that can be given out: what might be the beginning of a stop string is held back until it is
    decided. `found` turns true with the push that completes a stop string; whatever follows is not looked at.
    """

    def __init__(self, patterns: Patterns) -> None:
        self._by_first = patterns.by_first
        self._matched: dict[Pattern, int] = {}  # those that the text's end is the beginning of
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Takes more text; returns what is certainly before any stop string."""
        if not self._by_first or self.found:
            return "" if self.found else text
        pending = self._held + text
        for position in range(len(self._held), len(pending)):
            complete = self._advance(pending[position])
            if complete:
                self.found = True
                return pending[: position + 1 - complete]
        held = max(self._matched.values(), default=0)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        rest = "" if self.found else self._held
        self._held = ""
        return rest

    def _advance(self, character: str) -> int:
        """Takes one character; returns the length of the longest stop string that it completes, or 0."""
        before = self._matched
        if not before and character not in self._by_first:
            return 0
        begun = (pattern for pattern in self._by_first.get(character, ()) if pattern not in before)
        after = {pattern: pattern.advance(before.get(pattern, 0), character) for pattern in (*before, *begun)}
        self._matched = {pattern: matched for pattern, matched in after.items() if matched}
        return max((matched for pattern, matched in after.items() if matched == len(pattern.stop)), default=0)
