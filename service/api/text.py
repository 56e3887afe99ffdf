"""Between text and token ids: the tokenizer, and what must hold before a prompt goes to the engine.

This file knows the model's vocabulary and context (EngineInfo); it knows no HTTP. The command line uses it as well.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from tokenizers import Tokenizer

from service.api.chat_renderer import ChatRenderer
from service.api.fields import DEFAULT_MAX_TOKENS, MAX_SEED, OneTextFields
from service.engine.detokenizer import Detokenizer, special_token_ids
from service.engine.request import EngineInfo, SamplingParams, TextForm
from service.errors import InvalidRequestError

_THREAD_CHARACTERS = 20_000  # longer texts are tokenized in a thread: the event loop goes on


class TextCodec:
    """One model's tokenizer."""

    def __init__(self, info: EngineInfo, chats: ChatRenderer | None = None) -> None:
        self._tokenizer = Tokenizer.from_file(info.tokenizer_path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_ids = special_token_ids(self._tokenizer)
        self._chats = chats
        self._info = info

    async def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation as token ids, up to where the assistant begins. Raises what ChatRenderer.render does."""
        assert self._chats is not None, "this codec is for prompts"
        return self._checked(await self.encode(await self._chats.render(messages), False), "messages")

    async def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """A prompt as token ids. Raises InvalidRequestError when it is empty, too long or not of this vocabulary."""
        return self._checked(await self._ids(prompt) if prompt else [], "prompt")

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise InvalidRequestError(f"`{param}` is empty", param=param, hint="give at least one token")
        self._check_known(ids, param)
        if len(ids) > self._info.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens, and the context holds {self._info.max_model_len}",
                param=param,
                code="context_length_exceeded",
                hint="shorten the prompt",
            )
        return ids

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        return await self.encode(prompt) if isinstance(prompt, str) else prompt

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises InvalidRequestError for half of a surrogate pair, which is no text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text has a lone surrogate at character {error.start}") from None
        if len(text) > _THREAD_CHARACTERS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        return self._encode(text, add_special_tokens)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises InvalidRequestError for ids outside the vocabulary."""
        self._check_known(ids, "token_ids")
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; together they are the text."""
        detokenizer = self.detokenizer()
        texts = [detokenizer.push(id) for id in ids]
        if texts:
            texts[-1] += detokenizer.flush()
        return texts

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """An empty one, for the text that follows a prompt."""
        return Detokenizer(self._tokenizer, prompt_ids, self._special_ids)

    def token_text(self, id: int) -> str:
        """One token alone."""
        text: str = self._tokenizer.decode([id], skip_special_tokens=False)
        return text

    def sampling(
        self,
        body: OneTextFields,
        prompt_tokens: int,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        form: TextForm | None = None,
    ) -> SamplingParams:
        """The caller's wishes with defaults filled in. Raises InvalidRequestError for what this model cannot do."""
        bias = {int(id): value for id, value in (body.logit_bias or {}).items()}
        self._check_known(bias, "logit_bias")
        self._check_known(body.stop_token_ids or (), "stop_token_ids")
        given = body.model_dump(
            exclude_none=True,
            include={
                *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
                *("frequency_penalty", "ignore_eos", "n"),
            },
        )
        return SamplingParams(
            max_tokens=self._max_tokens(body.wanted_tokens, prompt_tokens),
            logit_bias=bias,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            seed=draw_seed() if body.seed is None else body.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            form=form,
            **given,
        )

    def _max_tokens(self, wanted: int | None, prompt_tokens: int) -> int:
        room = self._info.max_model_len - prompt_tokens
        if room < 1:
            raise InvalidRequestError(
                f"the prompt's {prompt_tokens} tokens leave no room in the context of {self._info.max_model_len}",
                param="prompt",
                code="context_length_exceeded",
                hint="shorten the prompt",
            )
        if wanted is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if wanted > room:
            raise InvalidRequestError(
                f"prompt ({prompt_tokens} tokens) + max_tokens ({wanted}) = {prompt_tokens + wanted} is over the "
                f"context of {self._info.max_model_len} tokens",
                param="max_tokens",
                code="context_length_exceeded",
                hint=f"lower max_tokens to {room} or shorten the prompt",
            )
        return wanted

    def _check_known(self, ids: Sequence[int] | dict[int, float], param: str) -> None:
        unknown = next((id for id in ids if not 0 <= id < self._info.vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"`{param}` has the token id {str(unknown)[:20]}; ids go from 0 to {self._info.vocab_size - 1}",
                param=param,
                code="unknown_token",
            )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids


def draw_seed() -> int:
    """A seed for who gave none."""
    return secrets.randbelow(MAX_SEED + 1)
