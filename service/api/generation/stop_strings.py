"""Stop strings in a text that grows: found as soon as they are complete, held back while they may become so.

Special tokens are not in the text. A stop string that names one together with other text, as "<|im_end|>\\n", is looked
for in the text with the special tokens' own.

What a character costs depends on the strings that the text may be in the middle of, not on how many there are.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence


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

    @property
    def border(self) -> int:
        """How much of the string its own end is the beginning of."""
        return self._borders[-1]

    def advance(self, matched: int, character: str) -> int:
        """How much is matched after one more character."""
        while matched and character != self.stop[matched]:
            matched = self._borders[matched - 1]
        return matched + (character == self.stop[matched])


_ByFirst = Mapping[str, Sequence[Pattern]]  # by their first characters


class Patterns:
    """The stop strings of one call, which all its choices share."""

    def __init__(self, stops: Sequence[str], special_texts: Collection[str] = ()) -> None:
        """`special_texts` are those of the special tokens."""
        self.plain: dict[str, list[Pattern]] = defaultdict(list)
        self.marked: dict[str, list[Pattern]] = defaultdict(list)  # those that name a special token
        for stop in stops:
            patterns = self.marked if any(special in stop for special in special_texts) else self.plain
            patterns[stop[0]].append(Pattern(stop))


class StopStrings:
    """Cuts a growing text before the first of some strings.

    `push` returns the text that can be given out: what might be the beginning of a stop string is held back until it is
    decided. `found` turns true with the push that completes a stop string; whatever follows is not looked at. A string
    that is complete while the text may not end yet is passed over.
    """

    def __init__(self, patterns: Patterns) -> None:
        self._plain = _Matcher(patterns.plain)
        self._marked = _Matcher(patterns.marked)
        self._is_off = not patterns.plain and not patterns.marked
        self._held: list[tuple[str, bool]] = []  # characters, and whether they are of the text
        self.found = False

    def push(self, text: str, *, may_end: bool = True) -> str:
        """Takes more text; returns what is certainly before any stop string."""
        return text if self._is_off else self._push(text, True, may_end)

    def push_special(self, text: str, *, may_end: bool = True) -> str:
        """Takes what a special token is called, which is not of the text; returns as `push` does."""
        return "" if self._is_off else self._push(text, False, may_end)

    def flush(self) -> str:
        """The text held back, when it has ended without a stop string."""
        rest = "" if self.found else _shown(self._held)
        self._held = []
        return rest

    def _push(self, text: str, shown: bool, may_end: bool) -> str:
        if self.found:
            return ""
        pending = self._held + [(character, shown) for character in text]
        for end in range(len(self._held) + 1, len(pending) + 1):
            character = pending[end - 1][0]
            marked = self._marked.advance(character, may_end)
            plain = self._plain.advance(character, may_end) if shown else 0
            if marked or plain:
                self.found = True
                return _shown(pending[: _start(pending[:end], plain, marked)])
        held = _start(pending, self._plain.held, self._marked.held)
        self._held = pending[held:]
        return _shown(pending[:held])


class _Matcher:
    """Some stop strings, and how much of each is at the end of a text."""

    def __init__(self, by_first: _ByFirst) -> None:
        self._by_first = by_first
        self._matched: dict[Pattern, int] = {}  # those that the text's end is the beginning of

    @property
    def held(self) -> int:
        """Characters at the end of the text that may become a stop string."""
        return max(self._matched.values(), default=0)

    def advance(self, character: str, may_end: bool) -> int:
        """Takes one character; returns the length of the longest stop string that it completes, or 0."""
        before = self._matched
        if not before and character not in self._by_first:
            return 0
        begun = (pattern for pattern in self._by_first.get(character, ()) if pattern not in before)
        after = {pattern: pattern.advance(before.get(pattern, 0), character) for pattern in (*before, *begun)}
        complete = [pattern for pattern, matched in after.items() if matched == len(pattern.stop)]
        if not may_end:
            after |= {pattern: pattern.border for pattern in complete}
            complete = []
        self._matched = {pattern: matched for pattern, matched in after.items() if matched}
        return max((len(pattern.stop) for pattern in complete), default=0)


def _start(characters: Sequence[tuple[str, bool]], plain: int, marked: int) -> int:
    """Where the last `plain` characters of the text begin, or the last `marked` of all, whichever is first."""
    start = len(characters) - marked
    shown = [place for place, (_, is_shown) in enumerate(characters) if is_shown]
    return min(start, shown[-plain]) if plain else start


def _shown(characters: Sequence[tuple[str, bool]]) -> str:
    return "".join(character for character, is_shown in characters if is_shown)
