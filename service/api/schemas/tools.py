"""Functions that a chat's answer may call, which of them it must call, and calls that a conversation has had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from service.api.schemas.body import Body
from service.api.schemas.no_effect import NO_EFFECT, CacheControl, Name
from service.api.schemas.sizes import FINITE, check_schema_size

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_OF_FUNCTIONS = ("name", "description", "parameters", "strict")  # which another API of OpenAI has beside `type`
_WORDS = ("none", "auto", "required")


class Function(Body):
    """A function that the caller has."""

    name: FunctionName
    description: str | None = Field(None, description="For the chat template, which may show it to the model.")
    parameters: Annotated[dict[str, Any], BeforeValidator(check_schema_size), FINITE] | None = Field(
        None, description="The JSON Schema of its arguments, an object; no arguments when absent."
    )
    strict: bool | None = Field(None, description="The schema is enforced in any case.")


class Tool(Body):
    """Something that an answer may call: a function."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {"custom": (), **dict.fromkeys(_OF_FUNCTIONS, ())}
    instead: ClassVar[Mapping[str, str]] = dict.fromkeys(
        _OF_FUNCTIONS, 'put it within `function`, as {"type": "function", "function": {"name": ...}}'
    )

    type: Literal["function"]
    function: Function
    cache_control: CacheControl | None = Field(None, description=NO_EFFECT)

    def to_template(self) -> dict[str, Any]:
        """Return the tool as a chat template sees it."""
        shown = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": self.type, "function": shown}


class NamedFunction(Body):
    """One of the functions."""

    name: FunctionName


class NamedTool(Body):
    """One of the tools."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class ToolChoiceBody(Body):
    """A word, or the functions of which one must be called."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {"name": ()}
    instead: ClassVar[Mapping[str, str]] = {
        "name": 'put it within `function`, as {"type": "function", "function": {"name": ...}}'
    }

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _type_has_its_field(self) -> ToolChoiceBody:
        for name in ("function", "allowed_tools"):
            if (getattr(self, name) is not None) != (self.type == name):
                raise ValueError(f'type "{name}" needs `{name}`, and no other type takes it')
        return self

    @property
    def mode(self) -> str:
        """none, auto, required (any of the tools, or of those that are named), or function (the one that is named)."""
        return self.type if self.allowed_tools is None else self.allowed_tools.mode

    @property
    def names(self) -> list[str] | None:
        """The functions that it names; None where it names none."""
        if self.function is not None:
            return [self.function.name]
        return None if self.allowed_tools is None else [tool.function.name for tool in self.allowed_tools.tools]


def _words(value: object) -> object:
    """A word is an object of that type."""
    if isinstance(value, str) and value in _WORDS:
        return {"type": value}
    if value is None or (isinstance(value, dict) and value.get("type") not in _WORDS):
        return value
    raise ValueError('must be "required", {"type": "function", "function": {"name": ...}} or "none"')


ToolChoice = Annotated[
    ToolChoiceBody | None,
    BeforeValidator(_words, json_schema_input_type=Literal["none", "auto", "required"] | ToolChoiceBody | None),
]


class CalledFunction(Body):
    """A function that was called."""

    meant: ClassVar = frozenset({"arguments"})  # "" is none

    name: Annotated[Name, Field(min_length=1)]
    arguments: str | None = Field(None, description="JSON; the chat template sees what it says.")
    parsed_arguments: Any = Field(None, description=NO_EFFECT + " `arguments` says the same.")


class ToolCall(Body):
    """A call that an assistant has made."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {"custom": ()}

    id: Name | None = Field(None, description="Given to the template, which may leave it out.")
    type: Literal["function"] | None = None
    function: CalledFunction
    index: int | None = Field(None, description=NO_EFFECT)
    provider_specific_fields: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    cache_control: CacheControl | None = Field(None, description=NO_EFFECT)

    def to_template(self) -> dict[str, Any]:
        """Return the call as the renderer is given it, which makes an object of the arguments."""
        call: dict[str, Any] = {} if self.id is None else {"id": self.id}
        function = {"name": self.function.name, "arguments": self.function.arguments or "{}"}
        return {**call, "type": "function", "function": function}
