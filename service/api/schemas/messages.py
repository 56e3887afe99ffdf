"""The turns of a chat, as clients keep them: what an answer's message was, goes back in as it is.

Clients send back all that their own types have, most of it null. What only repeats or annotates a turn's text changes
nothing; what a template may show is given to it; what this server cannot read is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from service.api.schemas.body import MISSING_FIELD, Body
from service.api.schemas.fields import MAX_NAME_CHARACTERS
from service.api.schemas.sizes import is_list_of

MAX_PARTS = 256
NO_EFFECT = "Accepted because tools send it; changes nothing."

Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]


class CacheControl(Body):
    """Where a prompt should be cached, for servers that are told: this one caches every prompt."""

    type: Literal["ephemeral"] | None = None
    ttl: Name | None = None


class Part(Body):
    """A piece of a message."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = dict.fromkeys(
        ("image_url", "input_audio", "audio_url", "video_url", "file", "refusal"), ()
    )

    type: Literal["text"]
    text: str
    id: Name | None = Field(None, description=NO_EFFECT)
    cache_control: CacheControl | None = Field(None, description=NO_EFFECT)


def _parts(value: object) -> object:
    """A text is one part."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is None or is_list_of(value, dict):
        return value
    raise ValueError('must be a string or a list of parts of type "text"')


Content = Annotated[
    Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS)] | None,
    BeforeValidator(_parts, json_schema_input_type=str | list[Part] | None),
]


class Message(Body):
    """One turn of a conversation; a `developer` is a `system` to the template."""

    meant: ClassVar = frozenset({"content"})  # "" is a turn without words
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = dict.fromkeys(
        ("tool_calls", "tool_call_id", "function_call", "audio", "images", "thinking_blocks"), ()
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(None, description="Only an assistant's may be absent: it then said nothing.")
    name: Name | None = Field(None, description="Given to the template, which may leave it out.")
    reasoning_content: str | None = Field(None, description="Given to the template, which may leave it out.")
    reasoning: str | None = Field(None, description="Given to the template, which may leave it out.")
    refusal: str | None = Field(None, description="What an assistant said in place of an answer: part of its text.")
    id: Name | None = Field(None, description=NO_EFFECT)
    annotations: list[Any] | None = Field(None, description=NO_EFFECT)
    parsed: Any = Field(None, description=NO_EFFECT + " The content says the same.")
    provider_specific_fields: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    cache_control: CacheControl | None = Field(None, description=NO_EFFECT)

    @model_validator(mode="after")
    def _who_asks_says_something(self) -> Message:
        if not self.content and self.role != "assistant":
            raise PydanticCustomError(MISSING_FIELD, "missing", {"name": "content"})
        return self

    def to_template(self) -> dict[str, str]:
        """What a chat template sees."""
        text = "".join(part.text for part in self.content or ()) + (self.refusal or "")
        role = "system" if self.role == "developer" else self.role
        shown = {"name": self.name, "reasoning_content": self.reasoning_content, "reasoning": self.reasoning}
        return {"role": role, "content": text} | {name: value for name, value in shown.items() if value is not None}
