"""The model's tokenizer for callers in process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from service.contract.checks import check_token_ids
from service.contract.errors import InvalidRequestError
from service.library.bodies import chat_body
from service.library.loop_thread import LoopThread
from service.library.session import Session


class Tokenizer:
    """Texts and chats to token ids and back, as prompts are read."""

    def __init__(self, session: Session, loop: LoopThread) -> None:
        self._session = session
        self._tokenizer = session.tokenizer
        self._loop = loop

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text of any length. Raises InvalidRequestError for half of a surrogate pair."""
        if not isinstance(text, str):
            raise InvalidRequestError(f"a text is wanted, and not {type(text).__name__}", param="text")
        ids = self._tokenizer.tokenize(text, add_special_tokens, sys.maxsize)
        assert ids is not None, "no bound"
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises InvalidRequestError for ids outside the vocabulary."""
        return self._tokenizer.decode(_ids(token_ids), skip_special_tokens)

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each token adds. Raises InvalidRequestError for ids outside the vocabulary."""
        ids = _ids(token_ids)
        check_token_ids(ids, "token_ids", self._session.info)
        return self._tokenizer.texts(ids)

    def chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> list[int]:
        """The token ids of a conversation, up to where the assistant goes on. `fields` are those of OpenAI's chats that
        the template sees. Raises InvalidRequestError.
        """
        return self._loop.run(self._session.chat_ids(chat_body({**fields, "messages": messages})))


def _ids(token_ids: Sequence[int]) -> list[int]:
    if isinstance(token_ids, str | int) or not isinstance(token_ids, Iterable):
        kind = type(token_ids).__name__
        raise InvalidRequestError(
            f"token ids are wanted, and not {kind}", param="token_ids", hint="give a list of them"
        )
    return [int(id) for id in token_ids]
