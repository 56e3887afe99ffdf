"""The wire models of our own routes' request bodies, made of the fields of fields.py."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from service.api.schemas.body import Body
from service.api.schemas.fields import (
    INT32,
    MAX_NAME_CHARACTERS,
    MAX_SALT_CHARACTERS,
    PROMPT_SCHEMA,
    Logprobs,
    OneTextFields,
    Position,
    Prompt,
    SamplingFields,
    SteeringFields,
    TokenIds,
    XLoraFields,
)
from service.api.schemas.messages import MAX_MESSAGES, Message
from service.api.schemas.sizes import is_list_of, is_prompts
from service.chat_template import Chat

MAX_SETTINGS = 8  # of one POST /compare
MAX_TEXTS = 64  # of one POST /scalings
MAX_SELECTED = 16_384  # names or numbers in one list of Select

_FIELDS_OF_JUDGING = {"prompt", "settings", "timeout", "cache_salt"}  # of POST /compare, with no output to write


def _texts(value: object) -> object:
    """One message for a union of four types."""
    if isinstance(value, str) or is_list_of(value, int) or is_prompts(value, MAX_TEXTS):
        return value
    raise ValueError(f"must be a string, a list of token ids, or a list of 1 to {MAX_TEXTS} of either kind")


_TEXTS_SCHEMA = {
    "anyOf": [
        *PROMPT_SCHEMA["anyOf"],
        *({"type": "array", "items": one, "minItems": 1, "maxItems": MAX_TEXTS} for one in PROMPT_SCHEMA["anyOf"]),
    ]
}
Texts = Annotated[str | list[int] | list[str] | list[list[int]], PlainValidator(_texts), WithJsonSchema(_TEXTS_SCHEMA)]
Names = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]],
    Field(fail_fast=True, min_length=1, max_length=MAX_SELECTED),
]


class GenerateBody(SamplingFields, XLoraFields):
    """POST /generate."""

    prompt: Prompt = Field(description="Text, or token ids.")
    logprobs: Logprobs = Field(
        None, description="Alternatives per token; 0 gives the chosen token's own. Of the raw distribution."
    )


class CompareSetting(SteeringFields):
    """One of the gates that a comparison is about."""

    meant: ClassVar = frozenset({"token_ids"})  # [] is no output that could be judged

    label: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)] | None = Field(
        None, description="Comes back with the output."
    )
    token_ids: Annotated[TokenIds, Field(min_length=1)] | None = Field(
        None, description="An output that is there already: it is judged, and none is generated under this setting."
    )


class CompareBody(OneTextFields):
    """POST /compare."""

    prompt: Prompt = Field(description="Text, or token ids.")
    settings: Annotated[list[CompareSetting], Field(min_length=1, max_length=MAX_SETTINGS)] = Field(
        description="The gates to compare; {} is the gate as it is. Everything else, the seed included, is shared."
    )
    return_scalings: Literal["none", "mean", "full"] | None = Field(
        None, description="The weights that made each generated token: none, mean over the sites, or of every site."
    )
    scalings_dtype: Literal["float32", "float16"] | None = Field(
        None, description='Type of the array that "full" returns; float32 when absent.'
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = Field(
        None, description="Only requests with the same salt share computed prompts."
    )

    @model_validator(mode="after")
    def _dtype_needs_full(self) -> CompareBody:
        if self.scalings_dtype is not None and self.return_scalings != "full":
            raise ValueError('scalings_dtype needs return_scalings "full"')
        return self

    @model_validator(mode="after")
    def _sampling_needs_an_output_to_write(self) -> CompareBody:
        if any(setting.token_ids is None for setting in self.settings):
            return self
        for name in sorted(self.model_fields_set - _FIELDS_OF_JUDGING):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is of no use: every setting has token_ids, so nothing is generated")
        return self


class GateBody(Body):
    """PATCH /gate: what is absent stays as it is. Null has a meaning here, as in PEFT's setters."""

    null_is_meant: ClassVar = True

    scaling_pass_value: Annotated[float, Field(ge=-100, le=100)] | None = Field(
        None, description="The gate of the scaling pass; null is 1 / number of experts."
    )
    top_k_lora: Annotated[int, Field(ge=1, le=INT32)] | None = Field(
        None, description="Experts that act per site, in both passes; null is all."
    )
    global_scaling_weight: Annotated[float, Field(ge=-100, le=100)] = Field(
        1.0, description="Factor on what the experts add; not part of returned scalings."
    )


class LogBody(Body):
    """PUT /scalings/log."""

    enabled: bool = Field(description="Whether rows are taken from now on; those that are there stay.")
    max_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = Field(
        None, description="Most positions kept, the newest; 65536 when absent."
    )
    max_bytes: Annotated[int, Field(ge=1, le=1 << 28)] | None = Field(
        None, description="Most memory for them; 64 MiB when absent."
    )

    @model_validator(mode="after")
    def _bounds_need_a_log(self) -> LogBody:
        for name in ("max_tokens", "max_bytes"):
            if not self.enabled and getattr(self, name) is not None:
                raise ValueError(f"{name} needs enabled true")
        return self


class Select(Body):
    """A part of the rows [positions, sites, experts]. Order and repetition in its lists change nothing."""

    meant: ClassVar = frozenset({"sites", "layers", "module_types", "experts"})  # [] selects nothing

    start: Position | None = Field(None, description="First position; 0 when absent.")
    stop: Position | None = Field(
        None, description="The position after the last; the end of the text when absent or beyond it."
    )
    sites: Names | None = Field(None, description="Names of /info; a site must satisfy all three lists that are there.")
    layers: Annotated[list[Position], Field(fail_fast=True, min_length=1, max_length=MAX_SELECTED)] | None = Field(
        None, description="Decoder layers: the first number in a site's name."
    )
    module_types: Names | None = Field(None, description="Last parts of sites' names, as q_proj.")
    experts: Names | None = Field(
        None, description="The columns shown. Entropy, leads and divergence still see every expert."
    )

    @model_validator(mode="after")
    def _some_position(self) -> Select:
        if self.stop is not None and self.stop <= (self.start or 0):
            raise ValueError("stop must be greater than start")
        return self


def _not_drawn(format: object) -> object:
    """Refuses the pictures that earlier versions drew."""
    if format in ("svg", "png"):
        raise PydanticCustomError(
            "removed",
            "should be 'json', 'npy' or 'csv': the server no longer draws",
            {"hint": "the page at / draws, and so does `xlora-serve scalings --png FILE`"},
        )
    return format


class ScalingsBody(Body):
    """POST /scalings."""

    prompt: Texts = Field(description="Text, or token ids; or a list of either, answered as `texts`.")
    return_scalings: Literal["mean", "full"] | None = Field(
        None,
        description='mean when absent; "full" adds every site, and needs granularity token and format json or npy.',
    )
    scalings_dtype: Literal["float32", "float16"] | None = Field(
        None, description='Type of the array that "full" or format npy returns; float32 when absent.'
    )
    granularity: Literal["token", "site", "layer", "module_type"] | None = Field(
        None,
        description="One row of weights per position (mean over the sites; when absent), or per site, decoder layer or "
        "module type (mean over the positions and the group's sites).",
    )
    select: Select | None = Field(None, description="A part of the positions, sites and experts; all when absent.")
    format: Annotated[Literal["json", "npy", "csv"] | None, BeforeValidator(_not_drawn)] = Field(
        None,
        description="json when absent. npy: the rows [rows, experts], or [positions, sites, experts] with "
        '"full", of one text. csv: the rows with names and entropy.',
    )

    perplexity: bool | None = Field(
        None,
        description="Adds how likely each token is under X-LoRA, under the base model and under each selected expert "
        "alone with weight 1, and the perplexities. It runs the text once more for each of them, with logits; needs "
        "granularity token and format json or csv.",
    )

    @property
    def texts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        if self.is_batch:
            return self.prompt  # type: ignore[return-value]
        return [self.prompt]  # type: ignore[return-value]

    @property
    def is_batch(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and not isinstance(self.prompt[0], int)

    @model_validator(mode="after")
    def _fields_agree(self) -> ScalingsBody:
        full = self.return_scalings == "full"
        if full and (self.granularity or "token") != "token":
            raise ValueError('return_scalings "full" needs granularity "token"')
        if full and (self.format or "json") not in ("json", "npy"):
            raise ValueError('return_scalings "full" needs format "json" or "npy"')
        if self.scalings_dtype is not None and not full and self.format != "npy":
            raise ValueError('scalings_dtype needs return_scalings "full" or format "npy"')
        if self.perplexity and (self.granularity or "token") != "token":
            raise ValueError('perplexity needs granularity "token"')
        if self.perplexity and (self.format or "json") not in ("json", "csv"):
            raise ValueError('perplexity needs format "json" or "csv"')
        if self.is_batch and self.format == "npy":
            raise ValueError('prompt must be one text, not a list of texts, for format "npy"')
        return self


class TokenizeBody(Body):
    """POST /tokenize."""

    meant: ClassVar = frozenset({"text"})  # "" has no tokens

    text: str | None = Field(None, description="Text to split into tokens.")
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = Field(
        None, description="In place of text: a conversation, written by the model's chat template as for an answer."
    )
    add_special_tokens: bool | None = Field(
        None, description="As the model's tokenizer does for a prompt; true when absent. Only with text."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.text is None) == (self.messages is None):
            raise ValueError("exactly one of text and messages is needed")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens goes with text alone: the chat template writes them itself")
        return self

    def chat(self) -> Chat:
        """Return the conversation as the template takes it."""
        return Chat([message.to_template() for message in self.messages or ()])


class DetokenizeBody(Body):
    """POST /detokenize."""

    token_ids: TokenIds = Field(description="Token ids.")
    skip_special_tokens: bool | None = Field(None, description="true when absent.")
