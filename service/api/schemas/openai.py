"""The bodies of OpenAI's routes: the shared sampling schema, and `xlora` for what is ours.

A few fields that common tools always send change nothing here; each says so in its description. The turns of a chat
are in messages.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from service.api.schemas.body import UNSUPPORTED_FIELD, Body
from service.api.schemas.fields import (
    INT32,
    Alternatives,
    Logprobs,
    SamplingFields,
    XLoraFields,
)
from service.api.schemas.messages import MAX_MESSAGES, Message
from service.api.schemas.no_effect import NO_EFFECT, CacheControl, Name
from service.api.schemas.sizes import FINITE, at_most, is_list_of, is_prompts
from service.api.schemas.tools import MAX_TOOLS, Function, Tool, ToolChoice
from service.chat_template import Chat

MAX_PROMPTS = 256
MAX_METADATA = 16
MAX_VARIABLES = 64
# What the template is given in any case, and what would replace it.
_OWN_VARIABLES = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)

# vLLM's ways to say what a text must be.
_FORMS_OF_OTHERS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")


def _prompts(value: object) -> object:
    """One message for a union of four types, where pydantic would give one per member."""
    if isinstance(value, str) or (value and is_list_of(value, int)):
        return [value]
    if value and is_prompts(value, MAX_PROMPTS):
        return value
    raise ValueError(f"must be a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either kind")


def _modalities(value: object) -> object:
    """Names what is not text, before anything is said of how many there may be."""
    for one in value if is_list_of(value, str) else ():
        if one != "text":
            raise ValueError(f'has {one[:20]!r}, which this server does not have: its answers are ["text"]')
    return value


_TEXT = {"type": "string"}
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


class StreamOptions(Body):
    """Options of a stream: the usage that it carries besides tokens."""

    include_usage: bool | None = Field(None, description="A last chunk without choices has the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Every chunk has the usage so far.")
    include_obfuscation: Literal[False] | None = Field(None, description=NO_EFFECT)

    @property
    def asks_for_usage(self) -> bool:
        """Whether it asks for anything."""
        return bool(self.include_usage or self.continuous_usage_stats)


class OpenAIFields(SamplingFields):
    """The fields of both of OpenAI's generating routes."""

    meant: ClassVar = frozenset({"web_search_options"})  # {} asks for a search
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **dict.fromkeys(_FORMS_OF_OTHERS, ()),
        **dict.fromkeys(("suffix", "functions", "audio", "prediction", "moderation", "web_search_options"), ()),
        "function_call": ("none", "auto"),  # which is what OpenAI does without functions
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    }
    instead: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(_FORMS_OF_OTHERS, "use `response_format`, with type json_schema or regex"),
        "functions": "use `tools`, which OpenAI has in their place",
        "function_call": "use `tool_choice`, which OpenAI has in its place",
    }

    model: Name | None = Field(None, description="A name from GET /v1/models; the served model when absent.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(
        None, description="OpenAI's newer name of max_tokens."
    )
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    xlora: XLoraFields | None = Field(None, description="What is ours; `extra_body` of OpenAI's clients sets it.")
    user: Name | None = Field(None, description=NO_EFFECT)
    safety_identifier: Name | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: Name | None = Field(None, description=NO_EFFECT)
    metadata: Annotated[dict[str, Name], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)] | None = Field(
        None, description=NO_EFFECT
    )
    store: Literal[False] | None = Field(None, description=NO_EFFECT)
    service_tier: Literal["auto", "default"] | None = Field(None, description=NO_EFFECT)
    cache_control: CacheControl | None = Field(None, description=NO_EFFECT)

    @model_validator(mode="after")
    def _fields_agree(self) -> OpenAIFields:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_completion_tokens and max_tokens differ; send one of them")
        if self.stream_options is not None and self.stream_options.asks_for_usage and not self.stream:
            raise ValueError("stream_options needs stream true")
        return self

    @property
    def extension(self) -> XLoraFields:
        """`xlora`, empty when absent."""
        return self.xlora or XLoraFields.model_validate({})

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens the caller wants, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tokens_field(self) -> str:
        """The name that was used."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class CompletionBody(OpenAIFields):
    """POST /v1/completions."""

    prompt: Prompts = Field(description="A text, token ids, or a list of either; each prompt has n choices.")
    max_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = Field(
        None, description="As in the other bodies; 0, with echo, scores the prompt and generates nothing."
    )
    max_completion_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = Field(
        None, description="OpenAI's newer name of max_tokens."
    )
    logprobs: Logprobs = Field(
        None, description="Alternatives per token; 0 gives the chosen token's own. Of the raw distribution."
    )
    echo: bool | None = Field(None, description="The prompt before the completion, with its logprobs if asked for.")
    best_of: int | None = Field(None, description="Only n, its default: all choices are returned.")

    @model_validator(mode="after")
    def _scoring_needs_echo(self) -> CompletionBody:
        if self.scores and not self.echo:
            raise ValueError(f"{self.tokens_field} is 0, which only scores the prompt, and that needs echo true")
        if self.scores and (self.n or 1) > 1:
            raise ValueError(f"n must be 1 with {self.tokens_field} 0: nothing is generated that could differ")
        if self.scores and self.extension.return_scalings not in (None, "none"):
            raise ValueError("xlora asks for scalings, but nothing is generated: POST /scalings has a prompt's")
        return self

    @property
    def scores(self) -> bool:
        """Whether nothing is generated: the prompt alone comes back, with its logprobs if asked for."""
        return self.wanted_tokens == 0

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be n: choosing among hidden choices is not supported")
        return self


class ChatBody(OpenAIFields):
    """POST /v1/chat/completions."""

    any_empty: ClassVar = frozenset({"tools"})

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = Field(None, description="Each token's logprob, of the raw distribution.")
    top_logprobs: Alternatives | None = Field(None, description="Alternatives per token; needs logprobs.")
    modalities: Annotated[list[Literal["text"]], BeforeValidator(_modalities), Field(max_length=1)] | None = Field(
        None, description=NO_EFFECT
    )
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the answer may call, in the template's view too; they need a tool_choice."
    )
    tool_choice: ToolChoice = Field(
        None,
        description='"required": the answer is a call of one of the tools; {"type": "function", "function": {"name": '
        '...}}: of this one; "none": it is a text. "auto", OpenAI\'s default, is not supported beside tools. Where a '
        "call is made there is no text that response_format could be about.",
    )
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT + " An answer has at most one call.")

    chat_template_kwargs: (
        Annotated[dict[Name, Any], Field(max_length=MAX_VARIABLES), at_most(MAX_VARIABLES), FINITE] | None
    ) = Field(None, description="More variables for the model's chat template, as enable_thinking.")
    add_generation_prompt: bool | None = Field(
        None, description="Whether the prompt goes on to where the assistant begins; as continue_final_message says."
    )
    continue_final_message: bool | None = Field(
        None, description="The last message is unfinished, and the answer goes on with it; false when absent."
    )

    @model_validator(mode="after")
    def _template_fields_agree(self) -> ChatBody:
        for name in sorted(_OWN_VARIABLES & self._variables.keys()):
            raise PydanticCustomError(UNSUPPORTED_FIELD, "not supported", {"name": f"chat_template_kwargs.{name}"})
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message goes with add_generation_prompt false alone")
        return self

    @model_validator(mode="after")
    def _tools_have_a_choice(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or ()]
        mode = "auto" if self.tool_choice is None else self.tool_choice.mode
        if names and mode == "auto":
            raise ValueError(
                'tool_choice "auto", which is the default beside tools, is not supported: send "required", {"type": '
                '"function", "function": {"name": ...}} or "none"'
            )
        if not names and mode not in ("auto", "none"):
            raise ValueError("tool_choice asks for a call, which needs tools")
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tools has two functions named {double!r}")
        for name in (self.tool_choice and self.tool_choice.names) or ():
            if name not in names:
                raise ValueError(f"tool_choice names {name!r}, which is none of the tools: {', '.join(names)}")
        if self.ignore_eos and self.called:
            raise ValueError("ignore_eos does not go with a tool call, which ends where its parameters are complete")
        return self

    @property
    def called(self) -> dict[int, Function]:
        """The functions of which the answer must call one, by their places in `tools`; none: it is a text."""
        if self.tool_choice is None or self.tool_choice.mode in ("none", "auto"):
            return {}
        names = self.tool_choice.names
        functions = [tool.function for tool in self.tools or ()]
        return {place: one for place, one in enumerate(functions) if names is None or one.name in names}

    @property
    def _variables(self) -> dict[str, Any]:
        """Return the variables that the template is given besides; null is absent."""
        return {name: value for name, value in (self.chat_template_kwargs or {}).items() if value is not None}

    def chat(self) -> Chat:
        """Return the conversation that the chat template is asked to write."""
        continued = bool(self.continue_final_message)
        return Chat(
            [message.to_template() for message in self.messages],
            [tool.to_template() for tool in self.tools] if self.tools else None,
            add_generation_prompt=not continued and self.add_generation_prompt is not False,
            continue_final_message=continued,
            variables=self._variables,
        )

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        return self
