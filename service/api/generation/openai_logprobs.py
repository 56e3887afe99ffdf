"""Logprobs as OpenAI's routes write them: per token its name and its bytes, or lists with offsets into the text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from service.api.generation.choice import Delta
from service.api.generation.vocabulary import Vocabulary
from service.api.schemas import openai_answers as answers
from service.contract.output import TokenOutput


class CompletionLogprobs:
    """Of a completion's choices, which may come delta by delta."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._offsets: dict[int, int] = defaultdict(int)  # characters of each choice's tokens so far

    def of(self, index: int, tokens: Sequence[tuple[str, TokenOutput | None]]) -> answers.CompletionLogprobs:
        """The next tokens of a choice, each with what it adds to the text; the first of an echo has no logprob."""
        offsets = []
        for text, _ in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": [text for text, _ in tokens],
            "token_logprobs": [None if token is None else token.logprob for _, token in tokens],
            "top_logprobs": [None if token is None else self._alternatives(token) for _, token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, token: TokenOutput) -> dict[str, float]:
        """By name, which no two tokens share. The token itself is always among them."""
        alternatives = dict([*token.top_logprobs, (token.id, token.logprob or 0.0)])
        return {self._vocabulary.name(id): logprob for id, logprob in alternatives.items()}


def chat_logprobs(vocabulary: Vocabulary, deltas: Sequence[Delta]) -> answers.ChatLogprobs:
    """Of the tokens that some deltas brought a chat's choice."""

    def entry(id: int, logprob: float, at_start: bool) -> answers.ChatAlternative:
        written = vocabulary.bytes_of(id, at_start=at_start)
        return {"token": vocabulary.name(id), "logprob": logprob, "bytes": list(written)}

    content: list[answers.ChatToken] = [
        {
            **entry(delta.token.id, delta.token.logprob or 0.0, delta.at_start),
            "top_logprobs": [entry(id, logprob, delta.at_start) for id, logprob in delta.token.top_logprobs],
        }
        for delta in deltas
        if delta.token is not None
    ]
    return {"content": content, "refusal": None}
