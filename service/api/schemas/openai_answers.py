"""The answers of OpenAI's routes, whole and as chunks; answers.py says how such types are used.

What is ours is in `xlora`: of the answer and of each choice.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from service.api.schemas.answers import Cost, Steered, WithScalings, WithScalingsDelta


class Model(TypedDict):
    """One name that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Annotated[int, Field(description="The context: tokens of prompt and answer together.")]


class ModelList(TypedDict):
    """The answer of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class PromptDetails(TypedDict):
    """Of the prompt's tokens."""

    cached_tokens: int


class OpenAIUsage(TypedDict):
    """OpenAI's usage."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AsUsed(Steered):
    """The seed, and `experts` and `gate` as used."""

    seed: int


class XLoraAnswer(AsUsed, Cost):
    """The seed, `experts` and `gate` as used, and what the engine did."""


class OpenAIHead(TypedDict):
    """The first fields of answers and chunks of both routes."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class OpenAIAnswer(OpenAIHead):
    """The fields of whole answers of both routes."""

    usage: OpenAIUsage
    xlora: XLoraAnswer


class ChunkUsage(TypedDict):
    """The usage in a chunk."""

    usage: NotRequired[Annotated[OpenAIUsage | None, Field(description="Where asked for; null before the last.")]]


class OpenAIChunk(OpenAIHead, ChunkUsage):
    """The fields of chunks of both routes."""

    xlora: Annotated[AsUsed | XLoraAnswer, Field(description="What the engine did: in a last chunk with the usage.")]


FinishReason = Literal["stop", "length", "tool_calls"]  # OpenAI's words: its clients know no others


class WithEnd(TypedDict):
    """Why a choice ended, where OpenAI has no word for it."""

    finish_reason: NotRequired[
        Annotated[str, Field(description='Where it is none of OpenAI\'s, as "timeout": theirs is then "length".')]
    ]


class ChoiceDetails(WithScalings, WithEnd):
    """Our extension of a choice."""


class DeltaDetails(WithScalingsDelta, WithEnd):
    """Our extension of a choice in a chunk."""


class ChoiceXLora(TypedDict):
    """Our extension of a choice that has ended, and why."""

    finish_reason: FinishReason | None
    xlora: NotRequired[Annotated[ChoiceDetails, Field(description="Where there is something to say.")]]


class DeltaXLora(TypedDict):
    """Our extension of a choice in its last chunk, and why it ended."""

    finish_reason: FinishReason | None
    xlora: NotRequired[Annotated[DeltaDetails, Field(description="Where there is something to say.")]]


class CompletionLogprobs(TypedDict):
    """Per token; the first of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionText(TypedDict):
    """A choice of one prompt, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None


class CompletionChoice(CompletionText, ChoiceXLora):
    """One choice of one prompt."""


class CompletionAnswer(OpenAIAnswer):
    """The answer of POST /v1/completions without stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CompletionDelta(CompletionText, DeltaXLora):
    """The part of a choice that one chunk adds."""


class CompletionChunk(OpenAIChunk):
    """An event of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: Annotated[list[CompletionDelta], Field(description="None in a last chunk with the usage.")]


class ChatAlternative(TypedDict):
    """A token of OpenAI's chat logprobs."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(ChatAlternative):
    """A generated token, and others that were likely in its place."""

    top_logprobs: list[ChatAlternative]


class ChatLogprobs(TypedDict):
    """Per token."""

    content: list[ChatToken]
    refusal: None


class CalledFunction(TypedDict):
    """A function that is called, with its arguments."""

    name: str
    arguments: Annotated[str, Field(description="JSON that fits the function's parameters; cut off with the answer.")]


class ToolCall(TypedDict):
    """A function call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """A message of the model: a text, or calls."""

    role: Literal["assistant"]
    content: Annotated[str | None, Field(description="null where the answer is a call.")]
    refusal: None
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(description="Where the answer is a call; one.")]]


class ChatChoice(ChoiceXLora):
    """One choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatAnswer(OpenAIAnswer):
    """The answer of POST /v1/chat/completions without stream."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CalledFunctionDelta(TypedDict):
    """The part of a function call that one chunk brings."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The part of a function call that one chunk brings; the first one names it."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class ChatMessageDelta(TypedDict):
    """The part of the message that one chunk adds; the first names the role."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatDelta(DeltaXLora):
    """The part of a choice that one chunk adds."""

    index: int
    delta: ChatMessageDelta
    logprobs: ChatLogprobs | None


class ChatChunk(OpenAIChunk):
    """An event of POST /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: Annotated[list[ChatDelta], Field(description="None in a last chunk with the usage.")]
