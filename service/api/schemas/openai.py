"""The bodies of OpenAI's routes: the shared sampling schema, and `xlora` for what is ours.

What OpenAI has and this server has not is refused by name (UNSUPPORTED), unless it is null. A few fields that common
tools always send change nothing here; each says so in its description.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from service.api.schemas.fields import (
    MAX_LOGPROBS,
    MAX_NAME_CHARACTERS,
    Body,
    SamplingFields,
    XLoraFields,
)
from service.api.schemas.sizes import at_most, is_list_of, is_prompts

MAX_PROMPTS = 256
MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_METADATA = 16

UNSUPPORTED = frozenset(
    {
        *("suffix", "functions", "function_call", "audio", "prediction", "reasoning_effort", "verbosity"),
        *("web_search_options", "moderation"),
    }
)
_NO_EFFECT = "Accepted because tools send it; changes nothing."


def _prompts(value: object) -> object:
    """One message for a union of four types, where pydantic would give one per member."""
    if isinstance(value, str) or (value and is_list_of(value, int)):
        return [value]
    if value and is_prompts(value, MAX_PROMPTS):
        return value
    raise ValueError(f"must be a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either kind")


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPTS_SCHEMA = {
    "anyOf": [
        _TEXT,
        _IDS,
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TEXT},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _IDS},
    ]
}

Prompts = Annotated[list[str] | list[list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPTS_SCHEMA)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]


class StreamOptions(Body):
    """What a stream carries besides tokens."""

    include_usage: bool | None = Field(None, description="A last chunk without choices has the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Every chunk has the usage so far.")
    include_obfuscation: Literal[False] | None = Field(None, description=_NO_EFFECT)


class OpenAIFields(SamplingFields):
    """What both of OpenAI's generating routes take."""

    model: Name | None = Field(None, description="A name from GET /v1/models; the served model when absent.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="OpenAI's newer name of max_tokens."
    )
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    xlora: XLoraFields | None = Field(None, description="What is ours; `extra_body` of OpenAI's clients sets it.")
    user: Name | None = Field(None, description=_NO_EFFECT)
    safety_identifier: Name | None = Field(None, description=_NO_EFFECT)
    prompt_cache_key: Name | None = Field(None, description=_NO_EFFECT)
    metadata: Annotated[dict[str, Name], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)] | None = Field(
        None, description=_NO_EFFECT
    )
    store: Literal[False] | None = Field(None, description=_NO_EFFECT)
    service_tier: Literal["auto", "default"] | None = Field(None, description=_NO_EFFECT)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None or name not in UNSUPPORTED}

    @model_validator(mode="after")
    def _fields_agree(self) -> OpenAIFields:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_completion_tokens and max_tokens differ; send one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self

    @property
    def extension(self) -> XLoraFields:
        """`xlora`, empty when absent."""
        return self.xlora or XLoraFields.model_validate({})

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens the caller wants, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(OpenAIFields):
    """POST /v1/completions."""

    prompt: Prompts = Field(description="A text, token ids, or a list of either; each prompt has n choices.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Alternatives per token; 0 gives the chosen token's own. Of the raw distribution."
    )
    echo: bool | None = Field(None, description="The prompt before the completion, with its logprobs if asked for.")
    best_of: int | None = Field(None, description="Only n, its default: all choices are returned.")

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be n: choosing among hidden choices is not supported")
        return self


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _parts(value: object) -> object:
    """One message for a union of two types."""
    if isinstance(value, str) or (value and is_list_of(value, dict)):
        return value
    raise ValueError('must be a string or a list of parts of type "text"')


class Message(Body):
    """One turn of a conversation; a `developer` is a `system` to the template."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)],
        BeforeValidator(_parts),
    ]
    name: Name | None = Field(None, description="Given to the template, which may leave it out.")
    refusal: None = None

    def to_template(self) -> dict[str, str]:
        """What a chat template sees."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message if self.name is None else message | {"name": self.name}


class ChatBody(OpenAIFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = Field(None, description="Each token's logprob, of the raw distribution.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Alternatives per token; needs logprobs."
    )
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(None, description=_NO_EFFECT)
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description=_NO_EFFECT + " Only empty.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description=_NO_EFFECT)
    parallel_tool_calls: bool | None = Field(None, description=_NO_EFFECT)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self
