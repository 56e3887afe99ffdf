"""Token ids to text, one token at a time.

A character may be spread over several tokens; half a character is never given out. Each token costs the decoding of a
short window, however long the text is. This file knows no requests and no engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer

from service.api.generation.vocabulary import Vocabulary

_REPLACEMENT = "\ufffd"
_WINDOW_TOKENS = 8  # the window is cut back when it is longer than this, with no character unfinished ...
_MAX_WINDOW_TOKENS = 16  # ... or than this, when nothing but beginnings of characters comes
_MAX_HELD = 16  # replacement characters: some tokenizers give one for each byte since the last token that is text
_KEPT_TOKENS = range(4, 9)  # ... to the fewest of these many tokens that decode to the same tail
_CONTEXT_TOKENS = range(5, 9)  # of the prompt, the fewest that are whole characters at their end: some tokenizers drop
# a space at the very beginning of a text


class Detokenizer:
    """The text of one growing sequence of tokens.

    `push` returns what a token adds to the text: perhaps nothing, while a character is unfinished. `flush` returns what
    is held back at the end, where an unfinished character becomes U+FFFD. Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # knows whether a character is unfinished
        self._window = self._context(prompt_ids)
        self._given = len(self._decode(self._window))  # characters of the window's text already given out
        self._last = ""  # the latest of them

    @property
    def at_start(self) -> bool:
        """Whether no text stands before the next token, neither the prompt's nor its own."""
        return not self._window

    def push(self, token_id: int) -> str:
        if token_id in self._vocabulary.special_ids:
            return ""
        self._window.append(token_id)
        self._utf8.decode(self._vocabulary.bytes_of(token_id))
        unfinished = bool(self._utf8.getstate()[0])
        text = self._decode(self._window)
        added = text[self._given : len(text) - (_held(text) if unfinished else 0)]
        self._given += len(added)
        if len(self._window) > (_MAX_WINDOW_TOKENS if unfinished else _WINDOW_TOKENS):
            added += self._cut(text)
        self._last = (added or self._last)[-1:]
        return added

    def flush(self) -> str:
        """The rest of the text; call it once, at the end."""
        text = self._decode(self._window)
        given, rest = text[: self._given], text[self._given :]
        self._given = len(text)
        if given.endswith(_REPLACEMENT) and self._last not in ("", _REPLACEMENT):
            # A run of byte tokens whose end is unfinished is replaced as a whole, given out or not.
            return _REPLACEMENT * len(self._utf8.getstate()[0])
        return rest

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt; none where it ends within a character."""
        for tokens in _CONTEXT_TOKENS:
            ids = [id for id in prompt_ids[-tokens:] if id not in self._vocabulary.special_ids]
            if not self._decode(ids).endswith(_REPLACEMENT):
                return ids
        return []

    def _cut(self, text: str) -> str:
        """Shortens the window; returns text that was held back and is older than what is kept."""
        for kept in _KEPT_TOKENS:
            tail = self._decode(self._window[-kept:])
            if tail and text.endswith(tail):
                self._window = self._window[-kept:]
                older = len(text) - len(tail)
                added = text[self._given : older]
                self._given = max(self._given - older, 0)
                return added
        return ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return text


def _held(text: str) -> int:
    """How many characters at the end of a text that ends within one may still become something else."""
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_HELD)
