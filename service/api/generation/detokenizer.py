"""Token ids to text, one token at a time, and stop strings in that text.

A character may be spread over several tokens; half a character is never given out. Each token costs the decoding of a
short window, however long the text is. This file knows no requests and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD = 3  # an unfinished UTF-8 character is at most three bytes: so many replacement characters, so many tokens
_WINDOW_TOKENS = 8  # the window is cut back when it is longer than this ...
_KEPT_TOKENS = range(4, 9)  # ... to the fewest of these many tokens that decode to the same tail
_CONTEXT_TOKENS = 5  # of the prompt: some tokenizers drop a space at the very beginning of a text


class Detokenizer:
    """The text of one growing sequence of tokens.

    `push` returns what a token adds to the text: perhaps nothing, while a character is unfinished. `flush` returns what
    is held back at the end, where an unfinished character becomes U+FFFD. Special tokens have no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), special_ids: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        context = [id for id in prompt_ids[-_CONTEXT_TOKENS:] if id not in special_ids]
        while self._decode(context).endswith(_REPLACEMENT):  # it begins, or the prompt ends, within a character
            del context[0]
        self._window = context
        self._given = self._decode(context)  # the beginning of the window's text, already given out
        self._waited = 0  # tokens since the window's text began with that

    def push(self, token_id: int) -> str:
        """The text this token adds."""
        if token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and not text.startswith(self._given) and self._waited < _MAX_HELD:
            # A run of tokens that are bytes (<0xE6>) is decoded as a whole: as long as a character at its end is
            # unfinished, those before it, long given out, are replaced as well.
            self._waited += 1
            return ""
        self._waited = 0
        added = text[len(self._given) : len(text) - _held(text)]
        self._given = text[: len(self._given) + len(added)]
        if len(self._window) > _WINDOW_TOKENS:
            added += self._cut(text)
        return added

    def flush(self) -> str:
        """The rest of the text; call it once, at the end."""
        text = self._decode(self._window)
        rest = text[-self._waited :] if self._waited else text[len(self._given) :]
        self._given, self._waited = text, 0
        return rest

    def _cut(self, text: str) -> str:
        """Shortens the window; returns text that was held back and is older than what is kept."""
        for kept in _KEPT_TOKENS:
            tail = self._decode(self._window[-kept:])
            if tail and text.endswith(tail):
                self._window = self._window[-kept:]
                older = len(text) - len(tail)
                added = text[len(self._given) : older]
                self._given = (self._given + added)[older:]
                return added
        return ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return text


def _held(text: str) -> int:
    """How many characters at the end may still become something else."""
    if not text.endswith(_REPLACEMENT):
        return 0
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_HELD)


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that have no text, such as end of text."""
    return frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


@dataclass(slots=True)
class _Pattern:
    """One stop string and how much of it the text's end has matched (Knuth, Morris and Pratt 1977)."""

    stop: str
    borders: list[int]
    matched: int = 0

    @classmethod
    def of(cls, stop: str) -> _Pattern:
        borders = [0] * len(stop)
        length = 0
        for position in range(1, len(stop)):
            while length and stop[position] != stop[length]:
                length = borders[length - 1]
            length += stop[position] == stop[length]
            borders[position] = length
        return cls(stop, borders)

    def advance(self, character: str) -> bool:
        while self.matched and character != self.stop[self.matched]:
            self.matched = self.borders[self.matched - 1]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)


class StopStrings:
    """Cuts a growing text before the first of some strings.

    `push` returns the text that can be given out: what might be the beginning of a stop string is held back until it is
    decided. `found` turns true with the push that completes a stop string; whatever follows is not looked at.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._patterns = [_Pattern.of(stop) for stop in stops]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Takes more text; returns what is certainly before any stop string."""
        if not self._patterns or self.found:
            return "" if self.found else text
        pending = self._held + text
        for position in range(len(self._held), len(pending)):
            character = pending[position]
            complete = [len(pattern.stop) for pattern in self._patterns if pattern.advance(character)]
            if complete:
                self.found = True
                return pending[: position + 1 - max(complete)]
        held = max(pattern.matched for pattern in self._patterns)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        rest = "" if self.found else self._held
        self._held = ""
        return rest
