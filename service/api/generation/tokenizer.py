"""Between text and token ids: the tokenizer, and what must hold before a prompt goes to the engine.

This file knows the model's vocabulary and context (EngineInfo); it knows no HTTP. The command line uses it as well.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from service.api.generation.chat_renderer import ChatRenderer
from service.api.generation.detokenizer import Detokenizer
from service.api.generation.sampling_defaults import SamplingDefaults
from service.api.generation.vocabulary import Vocabulary
from service.api.off_loop import off_loop
from service.api.schemas.fields import DRAWN_SEEDS, OneTextFields
from service.chat_template import Chat
from service.contract.checks import check_context, check_token_ids, room_for_output
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.request import GrammarSpec, SamplingParams
from service.tokenizer_files import TokenizerFiles

MAX_TOKENIZED = 1 << 17  # tokens of one /tokenize or /detokenize, where the context holds no more
MAX_CALL_TOKENS = 1 << 19  # of all prompts of one call, where the context holds no more

_CHARACTERS_PER_TOKEN = 4  # a guess, by which it is decided whether a text is long
_PIECE_CHARACTERS = 1 << 14  # of a long text that is counted: a token takes some hundred bytes until it is an id
_EDGE_TOKENS = 128  # that cutting a text can add, at each cut
# The parameters that a body has by the same names, and that need no conversion.
_AS_GIVEN = {field.name for field in fields(SamplingParams)} - {
    *("max_tokens", "logit_bias", "stop_token_ids", "seed", "logprobs", "prompt_logprobs", "form")
}


class ModelTokenizer:
    """One model's tokenizer."""

    def __init__(
        self, info: EngineInfo, chats: ChatRenderer | None = None, defaults: SamplingDefaults | None = None
    ) -> None:
        files = TokenizerFiles.read(Path(info.tokenizer_path).parent)
        self._tokenizer = files.open()
        self._bos_id = self._tokenizer.token_to_id(files.special_tokens.get("bos_token", ""))
        self._chats = chats
        self._info = info
        self._defaults = defaults or SamplingDefaults()
        self.vocabulary = Vocabulary(self._tokenizer)

    @property
    def max_tokenized(self) -> int:
        """The most tokens that one /tokenize or /detokenize may be about: a prompt always may."""
        return max(MAX_TOKENIZED, self._info.max_model_len)

    async def chat_ids(self, chat: Chat) -> list[int]:
        """A conversation as token ids, up to where the assistant goes on. Raises what ChatRenderer.render does."""
        assert self._chats is not None, "this tokenizer is for prompts"
        return await self.encode(await self._chats.render(chat), False, "messages")

    async def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """A prompt as token ids. Raises InvalidRequestError when it is empty, too long or not of this vocabulary."""
        [ids] = await self.all_prompt_ids([prompt])
        return ids

    async def all_prompt_ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """As prompt_ids, of several prompts of one call, which has a bound on the tokens of all as well."""
        return await off_loop(functools.partial(self._all_prompts, prompts), tokens=sum(map(_tokens_about, prompts)))

    async def encode(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """The token ids of a text that is all of a prompt. Raises InvalidRequestError as prompt_ids does."""
        work = functools.partial(self._prompt, text, add_special_tokens, param)
        return await off_loop(work, tokens=_tokens_about(text))

    def tokenize(self, text: str, add_special_tokens: bool, most: int) -> list[int] | None:
        """The token ids of any text; None for one that has more than `most` by so much that they are not worth having.
        Takes long for a long text, and lets other threads run meanwhile.

        Raises InvalidRequestError for half of a surrogate pair, which is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text has a lone surrogate at character {error.start}") from None
        if len(text) > _PIECE_CHARACTERS and self._has_many_more(text, most):
            return None
        return self._encode(text, add_special_tokens)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises InvalidRequestError for ids outside the vocabulary."""
        check_token_ids(ids, "token_ids", self._info)
        [text] = self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return str(text)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; together they are the whole text."""
        detokenizer = self.detokenizer()
        texts = [detokenizer.push(id) for id in ids]
        if texts:
            texts[-1] += detokenizer.flush()
        return texts

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """An empty one, for the text that follows a prompt."""
        return Detokenizer(self._tokenizer, self.vocabulary, prompt_ids)

    def sampling(
        self,
        body: OneTextFields,
        prompt_tokens: int,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        form: GrammarSpec | None = None,
        most: int | None = None,
    ) -> SamplingParams:
        """The caller's params with defaults filled in; `most` bounds max_tokens where the caller does not say.

        Raises InvalidRequestError for what this model cannot do.
        """
        bias = {int(id): value for id, value in (body.logit_bias or {}).items()}
        check_token_ids(bias, "logit_bias", self._info)
        check_token_ids(body.stop_token_ids or (), "stop_token_ids", self._info)
        return SamplingParams(
            max_tokens=self._max_tokens(body, prompt_tokens, most),
            logit_bias=bias,
            stop_token_ids=(*(body.stop_token_ids or ()), *self._special_named(body.stop or ())),
            seed=draw_seed() if body.seed is None else body.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            form=form,
            **{**self._defaults.fields, **body.model_dump(exclude_none=True, include=_AS_GIVEN)},
        )

    def _special_named(self, stops: Sequence[str]) -> list[int]:
        """The special tokens that some stop strings name: they have no text in which a string could be found."""
        ids = map(self._tokenizer.token_to_id, stops)
        return [id for id in ids if id in self.vocabulary.special_ids]

    def _max_tokens(self, body: OneTextFields, prompt_tokens: int, most: int | None) -> int:
        max_tokens = body.wanted_tokens
        if max_tokens is None:
            bounds = [room_for_output(prompt_tokens, self._info)]
            if self._defaults.max_tokens is not None:
                bounds.append(max(self._defaults.max_tokens, body.min_tokens or 0))
            if most is not None:
                bounds.append(max(1, most))
            max_tokens = min(bounds)
        check_context(prompt_tokens, max_tokens, self._info, body.tokens_field)
        return max_tokens

    def _all_prompts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        found: list[list[int]] = []
        tokens, most = 0, max(MAX_CALL_TOKENS, self._info.max_model_len)
        for prompt in prompts:
            found.append(self._prompt(prompt) if isinstance(prompt, str) else self._checked(prompt))
            tokens += len(found[-1])
            if tokens > most:
                raise InvalidRequestError(
                    f"the first {len(found)} prompts have {tokens} tokens; at most {most} are allowed in one call",
                    param="prompt",
                    code="too_large",
                    hint="send the prompts in several calls",
                )
        return found

    def _prompt(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        ids = self.tokenize(text, add_special_tokens, self._info.max_model_len)
        if ids is None:
            raise self._too_long(f"more than {self._info.max_model_len}", param)
        if not ids and add_special_tokens and self._bos_id is not None:
            ids = [self._bos_id]  # the beginning of any text
        return self._checked(ids, param)

    def _checked(self, ids: list[int], param: str = "prompt") -> list[int]:
        if not ids:
            raise InvalidRequestError(f"`{param}` is empty", param=param, hint="give at least one token")
        if len(ids) > self._info.max_model_len:
            raise self._too_long(str(len(ids)), param)
        check_token_ids(ids, param, self._info)
        return ids

    def _too_long(self, tokens: str, param: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"the prompt has {tokens} tokens, and the context holds {self._info.max_model_len}",
            param=param,
            code="context_length_exceeded",
            hint="shorten the prompt",
        )

    def _has_many_more(self, text: str, most: int) -> bool:
        """Whether a text has more tokens than so many, told from its parts: those of 4 MiB of smileys, all at once,
        would take a gigabyte.
        """
        tokens, enough = 0, most + most // 4
        for start in range(0, len(text), _PIECE_CHARACTERS):
            tokens += len(self._encode(text[start : start + _PIECE_CHARACTERS], False))
            enough += _EDGE_TOKENS
            if tokens > enough:
                return True
        return False

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the tokenizer's methods, those for batches give up the interpreter's lock, and the fast one needs half the
        # time and memory: it leaves out where in the text each token is.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids


def _tokens_about(prompt: str | list[int]) -> int:
    return len(prompt) // _CHARACTERS_PER_TOKEN if isinstance(prompt, str) else len(prompt)


def draw_seed() -> int:
    """A seed for who gave none."""
    return secrets.randbelow(DRAWN_SEEDS)
