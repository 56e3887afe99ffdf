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
from service.api.schemas.no_effect import NO_EFFECT, CacheControl, Name
from service.api.schemas.sizes import is_list_of
from service.api.schemas.tools import ToolCall

MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_CALLS = 128  # of one turn


class Part(Body):
    """A part of a message's content."""

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
    any_empty: ClassVar = frozenset({"tool_calls"})
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = dict.fromkeys(
        ("function_call", "audio", "images", "thinking_blocks"), ()
    )
    instead: ClassVar = {"function_call": "use `tool_calls`, which OpenAI has in its place"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = Field(None, description="Only an assistant's may be absent: it then said nothing.")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_CALLS)] | None = Field(
        None, description="What an assistant has called."
    )
    tool_call_id: Name | None = Field(None, description="Of role tool: the call whose result the content is.")
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

    @model_validator(mode="after")
    def _calls_have_their_roles(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("has tool_calls, which only an assistant's turn may have")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("has a tool_call_id, which only a turn of role tool may have")
        return self

    def to_template(self) -> dict[str, Any]:
        """The message as a chat template sees it."""
        text = "".join(part.text for part in self.content or ()) + (self.refusal or "")
        role = "system" if self.role == "developer" else self.role
        shown = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "reasoning": self.reasoning,
            "tool_calls": [call.to_template() for call in self.tool_calls] if self.tool_calls else None,
            "tool_call_id": self.tool_call_id,
        }
        return {"role": role, "content": text} | {name: value for name, value in shown.items() if value is not None}
