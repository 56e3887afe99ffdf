"""Single tokens: their bytes, and names that no other token has.

A token may be half a character, or begin with a space that decoding it alone would drop. Its bytes are read off its
entry in the vocabulary by the steps of the tokenizer's decoder, so that those of some tokens, joined, are their text.
This file knows no requests.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class Vocabulary:
    """The tokens of one tokenizer, one at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special_ids = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._tokenizer = tokenizer
        self._steps = list(_steps(tokenizer.decoder))
        self._alphabet = _byte_alphabet() if any(step["type"] == "ByteLevel" for step in self._steps) else {}
        self._characters = {byte: character for character, byte in self._alphabet.items()}
        self._names: dict[int, str] = {}

    @functools.cached_property
    def special_texts(self) -> list[str]:
        return [text for id in sorted(self.special_ids) if (text := self._tokenizer.id_to_token(id))]

    def bytes_of(self, id: int, *, at_start: bool = False) -> bytes:
        """The text that a token adds; none for a special token. `at_start`: no text stands before it, where some
        tokenizers drop a space.
        """
        token = None if id in self.special_ids else self._tokenizer.id_to_token(id)
        found = b"" if token is None else self._written(token)
        if found is None:
            found = self._after_another(id)
        return self._decode([id]).encode() if at_start and found.startswith(b" ") else found

    def name(self, id: int) -> str:
        """Its text where it has one of its own, as do special tokens; OpenAI's `bytes:\\xf0` for what is no text."""
        name = self._names.get(id)
        if name is None:
            name = self._names[id] = self._name(id, self.bytes_of(id))
        return name

    def _name(self, id: int, written: bytes) -> str:
        if not written:
            return self._tokenizer.id_to_token(id) or f"token_id:{id}"
        if next(self._writers(written), id) != id:
            return f"token_id:{id}"
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)

    def _writers(self, written: bytes) -> Iterator[int]:
        """The tokens that write the same, as "a" and `<0x61>` do, ordinary ones first."""
        for spelling in self._spellings(written):
            id = self._tokenizer.token_to_id(spelling)
            if id is not None and id not in self.special_ids and self._written(spelling) == written:
                yield id

    def _spellings(self, written: bytes) -> Iterator[str]:
        """How the vocabulary may spell what writes this."""
        if self._characters:
            yield "".join(self._characters[byte] for byte in written)
        text = written.decode(errors="replace")
        for step in self._steps:
            match step:
                case {"type": "Replace", "pattern": {"String": mark}} | {"type": "Metaspace", "replacement": mark}:
                    yield text.replace(" ", mark)
        yield text
        if len(written) == 1:
            yield f"<0x{written[0]:02X}>"

    def _written(self, token: str) -> bytes | None:
        """The decoder's text of a token amid others; None where that depends on them."""
        fused = False
        for step in self._steps:
            match step:
                case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                    token = token.replace(pattern, content)
                case {"type": "Metaspace", "replacement": replacement}:
                    token = token.replace(replacement, " ")
                case {"type": "ByteFallback"} if byte := _BYTE_TOKEN.fullmatch(token):
                    return bytes.fromhex(byte[1])
                case {"type": "ByteLevel"}:
                    return self._byte_level(token)
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "ByteFallback"}:
                    pass
                case {"type": "Strip"} if fused:  # the text's ends, not the token's
                    pass
                case _:
                    return None
        return token.encode()

    def _byte_level(self, token: str) -> bytes:
        try:
            return bytes(map(self._alphabet.__getitem__, token))
        except KeyError:  # an added token, which is written as it is
            return token.encode()

    def _after_another(self, id: int) -> bytes:
        """Its decoded text behind some token that has text."""
        return self._decode([*self._another, id]).removeprefix(self._decode(self._another)).encode()

    @functools.cached_property
    def _another(self) -> list[int]:
        ids = (id for id in range(self._tokenizer.get_vocab_size()) if id not in self.special_ids)
        return list(itertools.islice((id for id in ids if self._decode([id]).strip(_REPLACEMENT + " ")), 1))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return text


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    """A decoder's parts, in order; one that is not there joins tokens with spaces."""
    pending = [{"type": "None"} if decoder is None else json.loads(decoder.__getstate__())]
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending[:0] = step["decoders"]
        else:
            yield step


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character stands for in byte-level vocabularies, as GPT-2 numbered them: those that can be
    printed stand for themselves, the others follow from U+0100 on, in order.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
