"""The fields that request bodies are made of: how a text is sampled, what it must be, who acts on it.

Bodies are strict: no type is coerced, no unknown field is ignored, every number is bounded; body.py says what is
absent. This file knows shapes and ranges; what depends on the model (its context, its vocabulary) is checked in
contract/checks.py. The routes' bodies are in bodies.py and openai.py.

A body is checked on the event loop: sizes come before items, and the first mistake of a list ends it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from service.api.schemas.body import Body, absent_at
from service.api.schemas.sizes import check_schema_size, is_list_of

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024
MAX_SALT_CHARACTERS = 256
MAX_SEED = 2**63 - 1
DRAWN_SEEDS = 2**53  # a drawn one is below: JavaScript rounds larger integers, and its clients send seeds back
MAX_EXPERTS = 1024
MAX_GATE_WEIGHTS = 1024
MAX_NAME_CHARACTERS = 512

INT32 = 2**31 - 1
_TOKEN_ID = re.compile(r"[0-9]{1,10}")


def _prompt(value: object) -> object:
    """One message for a union of two types, where pydantic would give one per member."""
    if isinstance(value, str) or is_list_of(value, int):
        return value
    raise ValueError("must be a string or a list of token ids")


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not is_list_of(stops, str):
        raise ValueError("must be a string or a list of strings")
    stops = list(dict.fromkeys(filter(None, stops)))
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} different strings; at most {MAX_STOPS} are allowed")
    if not all(len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"each string must have at most {MAX_STOP_CHARACTERS} characters")
    return stops or None


def _logit_bias(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    if not isinstance(value, dict) or not all(isinstance(key, str) and _TOKEN_ID.fullmatch(key) for key in value):
        raise ValueError('must be an object from token ids to numbers, as {"42": -100}')
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise ValueError("values must be numbers from -100 to 100")
    return {key: float(bias) for key, bias in value.items()}


def _layer_weights(value: object) -> object:
    """A number is one entry for every site."""
    if type(value) in (int, float):
        return [{"weight": value}]
    if value and is_list_of(value, dict):
        return value
    raise ValueError('must be a number or a list such as [{"weight": 1, "layers": [0, 3]}]')


PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
    ]
}
_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "maxLength": MAX_STOP_CHARACTERS},
        {
            "type": "array",
            "items": {"type": "string", "maxLength": MAX_STOP_CHARACTERS},
            "description": f"At most {MAX_STOPS} different strings; an empty one is none.",
        },
        {"type": "null"},
    ]
}
_BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": f"^{_TOKEN_ID.pattern}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        {"type": "null"},
    ]
}

_WEIGHT_SCHEMA = {"type": "number", "minimum": -100, "maximum": 100}
_LAYERS_SCHEMA = {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "minimum": 0}}
_LAYER_WEIGHTS_SCHEMA = {
    "anyOf": [
        _WEIGHT_SCHEMA,
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_GATE_WEIGHTS,
            "items": {
                "type": "object",
                "required": ["weight"],
                "additionalProperties": False,
                "properties": {
                    "weight": _WEIGHT_SCHEMA,
                    "layers": {
                        "anyOf": [_LAYERS_SCHEMA, {"type": "null"}],
                        "description": "The first and the last layer, both included; every site when absent.",
                    },
                },
            },
        },
    ]
}

Prompt = Annotated[str | list[int], PlainValidator(_prompt), WithJsonSchema(PROMPT_SCHEMA)]
Stops = Annotated[list[str] | None, PlainValidator(_stops), WithJsonSchema(_STOP_SCHEMA)]
LogitBias = Annotated[dict[str, float] | None, PlainValidator(_logit_bias), WithJsonSchema(_BIAS_SCHEMA)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Position = Annotated[int, Field(ge=0, le=INT32)]
Float = Annotated[float, Field(allow_inf_nan=False)]
Alternatives = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Logprobs = Annotated[
    Alternatives | None,  # false is absent: elsewhere the field is a switch
    BeforeValidator(
        lambda value: None if value is False else value, json_schema_input_type=Alternatives | Literal[False] | None
    ),
]


class JsonSchema(Body):
    """A JSON Schema, as OpenAI's clients send it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = Field(description="Yours; changes nothing.")
    description: Annotated[str, Field(max_length=4096)] | None = Field(None, description="Yours; changes nothing.")
    schema_: Annotated[dict[str, Any], BeforeValidator(check_schema_size)] = Field(
        alias="schema", description="What the answer must fit."
    )
    strict: bool | None = Field(None, description="The schema is enforced in any case.")


class ResponseFormat(Body):
    """The form that the answer must have, from its first token to its last."""

    meant: ClassVar = frozenset({"pattern"})  # "" matches the empty text

    type: Literal["text", "json_object", "json_schema", "regex"] = Field(
        description="Any text; some JSON object; JSON that fits `json_schema`; a match of `pattern`."
    )
    json_schema: JsonSchema | None = Field(None, description="With type json_schema.")
    pattern: str | None = Field(
        None, description="With type regex: all of the answer matches it. Without look-around and back-references."
    )

    @model_validator(mode="after")
    def _type_has_its_field(self) -> ResponseFormat:
        if self.type != "regex":
            self.pattern = self.pattern or None
        for field, type in (("json_schema", "json_schema"), ("pattern", "regex")):
            if (getattr(self, field) is not None) != (self.type == type):
                raise ValueError(f'type "{type}" needs `{field}`, and no other type takes it')
        return self


class OneTextFields(Body):
    """How one text is sampled; names and meanings are OpenAI's."""

    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(
        None,
        description="Most tokens to generate. When absent, what the context leaves, or the server's "
        "--default-max-tokens; nothing is reserved for them.",
    )
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = Field(
        None,
        description="So many tokens come before an end-of-text token, a stop token or a stop string; where "
        "response_format leaves nothing more to say, the text ends all the same.",
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy; 1 when absent.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Nucleus sampling; 1 (off) when absent."
    )
    top_k: Annotated[Annotated[int, Field(ge=-1, le=INT32)] | None, absent_at(-1)] = Field(
        None, description="0 (off) when absent; -1 is absent."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="0 (off) when absent.")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="Over prompt and output; 1 (off) when absent."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Over the output.")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Over the output.")
    logit_bias: LogitBias = Field(None, description="Added to the logits of these token ids.")
    stop: Stops = Field(None, description="Generation ends before the first of these strings.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = Field(
        None, description="Generation ends with the first of these tokens."
    )
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-text token.")
    response_format: ResponseFormat | None = Field(None, description="What the answer must be; any text when absent.")
    seed: Annotated[Annotated[int, Field(ge=-1, le=MAX_SEED)] | None, absent_at(-1)] = Field(
        None, description="Drawn below 2^53, and returned, when absent; -1 is absent."
    )
    timeout: Annotated[float, Field(ge=1, le=86_400)] | None = Field(
        None,
        description='Seconds from arrival; what is unfinished then ends with finish_reason "timeout", or with 504 if '
        "there is no token yet. The server's --request-timeout when absent, and at most.",
    )

    @model_validator(mode="after")
    def _a_form_has_an_end(self) -> OneTextFields:
        if self.ignore_eos and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("ignore_eos does not go with this response_format, which decides where the text ends")
        return self

    @model_validator(mode="after")
    def _min_tokens_fit(self) -> OneTextFields:
        if self.wanted_tokens is not None and (self.min_tokens or 0) > self.wanted_tokens:
            raise ValueError(f"min_tokens must not be greater than {self.tokens_field}")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens the caller wants."""
        return self.max_tokens

    @property
    def tokens_field(self) -> str:
        """The field that says so."""
        return "max_tokens"


class SamplingFields(OneTextFields):
    """The sampling schema that every generating route shares."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="Choices; 1 when absent.")
    stream: bool | None = Field(None, description="Server-sent events, one per token.")


class LayerWeight(Body):
    """The weight of one expert at every site, or at those of some layers."""

    meant: ClassVar = frozenset({"layers"})  # [] is no layer

    weight: Annotated[float, Field(ge=-100, le=100)]
    layers: Annotated[list[Annotated[int, Field(ge=0, le=INT32)]], Field(min_length=2, max_length=2)] | None = None


ExpertName = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]
ExpertNames = Annotated[list[ExpertName], Field(fail_fast=True, max_length=MAX_EXPERTS)]
LayerWeights = Annotated[
    list[LayerWeight],
    Field(fail_fast=True, min_length=1),
    BeforeValidator(_layer_weights),
    WithJsonSchema(_LAYER_WEIGHTS_SCHEMA),
]


class Experts(Body):
    """Which experts act. The names are those of GET /info."""

    meant: ClassVar = frozenset({"only", "weights"})  # [] and {} are the base model

    only: ExpertNames | None = Field(
        None, description="The gate chooses among these alone; [] is the base model without experts."
    )
    exclude: ExpertNames | None = Field(
        None, description="The gate chooses among the others; with `only`, among those of it that are not named here."
    )
    weights: Annotated[dict[ExpertName, LayerWeights], Field(max_length=MAX_EXPERTS)] | None = Field(
        None,
        description="A fixed gate: each expert's weight, from -100 to 100, where 1 is the expert as it was trained and "
        'experts that are not named are 0. A list gives weights by layers, as [{"weight": 1}, {"weight": 0.5, '
        '"layers": [0, 3]}]: the last entry that covers a layer counts. No classifier runs, and no top-k; goes with no '
        "other field of `experts`, nor with the gate's temperature and top_k.",
    )

    @model_validator(mode="before")
    @classmethod
    def _weights_are_bounded(cls, value: Any) -> Any:
        """Before any of them is looked at."""
        weights = value.get("weights") if isinstance(value, dict) else None
        if isinstance(weights, dict):
            entries = sum(len(one) if isinstance(one, list) and one else 1 for one in weights.values())
            if entries > MAX_GATE_WEIGHTS:
                raise ValueError(f"has {entries} weights; at most {MAX_GATE_WEIGHTS} are allowed")
        return value


class Gate(Body):
    """A caller's changes to the gate."""

    temperature: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description="Of the gate's softmax, in place of the checkpoint's: lower is more decided."
    )
    top_k: Annotated[int, Field(ge=1, le=INT32)] | None = Field(
        None, description="Experts that act per site, in place of the checkpoint's; the number of experts is all."
    )
    freeze_after: Annotated[int, Field(ge=1, le=INT32)] | None = Field(
        None, description="From generated token n + 1 on, the weights that produced token n are used."
    )


class SteeringFields(Body):
    """How a request differs from the gate as it is."""

    experts: Experts | None = Field(None, description="Which experts act; as the gate decides when absent.")
    gate: Gate | None = Field(None, description="Changes to the gate, for this request.")


class XLoraFields(SteeringFields):
    """X-LoRA's fields: those of POST /generate, and the object `xlora` of OpenAI's routes."""

    return_scalings: Literal["none", "mean", "full"] | None = Field(
        None, description="The gate's weights of the experts: none, mean over the sites, or of every site."
    )
    scalings_start: Annotated[int, Field(ge=0, le=INT32)] | None = Field(
        None,
        description="First position whose row is returned. When absent, the position that produced the first "
        "generated token (the prompt's last), so that there is one row per generated token; 0 adds the prompt's rows.",
    )
    scalings_dtype: Literal["float32", "float16"] | None = Field(
        None, description='Type of the array that "full" returns; float32 when absent.'
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = Field(
        None, description="Only requests with the same salt share computed prompts."
    )

    @model_validator(mode="after")
    def _scalings_fields_need_scalings(self) -> XLoraFields:
        if self.scalings_start is not None and self.return_scalings in (None, "none"):
            raise ValueError('scalings_start needs return_scalings "mean" or "full"')
        if self.scalings_dtype is not None and self.return_scalings != "full":
            raise ValueError('scalings_dtype needs return_scalings "full"')
        return self
