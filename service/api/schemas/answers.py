"""The answers of our own routes, each described here, once: mypy holds what writers make to these types, orjson
encodes just that, and the OpenAPI document shows the same types.

A field that may be absent is NotRequired; one that may be null says so. OpenAI's answers are in openai_answers.py.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

import numpy as np
import numpy.typing as npt
from pydantic import Field, PlainValidator, WithJsonSchema
from typing_extensions import TypedDict

_NUMBER = {"type": "number"}
_NUMBER_OR_NULL = {"anyOf": [_NUMBER, {"type": "null"}]}
_AS_WRITTEN = PlainValidator(lambda value: value)  # an answer is not checked at run time
# Arrays, which orjson writes as lists, and NaN in them as null.
Matrix = Annotated[
    npt.NDArray[np.float32] | list[list[float]],
    _AS_WRITTEN,
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": _NUMBER}}),
]
Nats = Annotated[
    npt.NDArray[np.float32] | list[float | None],
    _AS_WRITTEN,
    WithJsonSchema({"type": "array", "items": _NUMBER_OR_NULL}),
]


class TokenText(TypedDict):
    """A token and the text it adds; "" while a character is unfinished."""

    id: int
    text: str


class Alternative(TokenText):
    """One of the most likely tokens of a position, alone."""

    logprob: float


class Token(TokenText):
    """A generated token."""

    logprob: NotRequired[Annotated[float, Field(description="Where asked for.")]]
    top_logprobs: NotRequired[Annotated[list[Alternative], Field(description="Where asked for.")]]


class ScalingsRows(TypedDict):
    """Rows of the gate. Row i is of position start + i, and position p produced the token at position p + 1."""

    start: int
    mean: Annotated[Matrix, Field(description="[E] per position: mean over the sites, after softmax and top-k.")]
    entropy: Annotated[Nats, Field(description="Nats per position, mean over the sites; null for an all-zero row.")]
    full: NotRequired[Annotated[str, Field(description="base64 of a .npy array [positions, sites, experts].")]]


class Scalings(ScalingsRows):
    """Rows of the gate. Row i is of position start + i, and position p produced the token at position p + 1."""

    experts: list[str]
    sites: list[str]


class ScalingsDelta(ScalingsRows):
    """More rows of the gate, in an event."""

    experts: NotRequired[Annotated[list[str], Field(description="In a choice's first event.")]]
    sites: NotRequired[Annotated[list[str], Field(description="In a choice's first event.")]]


class WithScalings(TypedDict):
    """The gate's rows of a choice."""

    scalings: NotRequired[Annotated[Scalings, Field(description="Where asked for.")]]


class WithScalingsDelta(TypedDict):
    """The gate's rows that an event adds to a choice."""

    scalings: NotRequired[Annotated[ScalingsDelta, Field(description="Where asked for.")]]


class Lookahead(TypedDict):
    """Drafts of the scaling pass, of all depths, that were kept, and dropped."""

    hits: int
    misses: int


class Speculation(TypedDict):
    """Tokens drafted from earlier text, and how many of them were right."""

    tokens: int
    accepted: int


class DraftsAtDepth(TypedDict):
    """Drafts that had rows, at one depth: how far they were from what they were made of."""

    depth: int
    drafted: int
    accepted: int


class Drafts(TypedDict):
    """Drafts that had rows, by source and depth, as far as there were any."""

    lookahead: Annotated[
        list[DraftsAtDepth], Field(description="Of the scaling pass; from depth 2 on by the bundle's draft layer.")
    ]
    prompt_lookup: Annotated[list[DraftsAtDepth], Field(description="Copied from earlier text.")]


class Cost(TypedDict):
    """The engine's work for a request."""

    forward_passes: Annotated[
        int,
        Field(description="Forwards that each choice took part in, summed; one may bring several tokens, or none."),
    ]
    scaling_rows: int
    real_rows: int
    lookahead: Annotated[Lookahead, Field(description="The sums over `drafts.lookahead`.")]
    speculation: Annotated[Speculation, Field(description="The sums over `drafts.prompt_lookup`.")]
    drafts: Drafts


class Usage(Cost):
    """The request's cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Steered(TypedDict):
    """How the request is steered, where it is."""

    experts: NotRequired[Annotated[dict[str, Any], Field(description="As in the request, where it is steered.")]]
    gate: NotRequired[Annotated[dict[str, Any], Field(description="As in the request, where it changes the gate.")]]


class OutputText(TypedDict):
    """A choice, or what an event adds to it."""

    index: int
    text: str
    token_ids: list[int]
    tokens: list[Token]
    finish_reason: str | None


class Output(OutputText, WithScalings):
    """One choice."""


class GenerateHead(Steered):
    """The fields of an answer of POST /generate that are about the whole call."""

    id: str
    model: str
    seed: int


class GenerateAnswer(GenerateHead):
    """The answer of POST /generate without stream."""

    outputs: list[Output]
    usage: Usage


class GenerateDelta(OutputText, WithScalingsDelta):
    """An event of POST /generate: what one token added to a choice, or its end."""

    id: str


class GenerateEnd(GenerateHead):
    """The last event of POST /generate before [DONE]."""

    usage: Usage


class ComparedToken(TokenText):
    """A token of an output that is compared."""

    logprob: float | None


class CompareOutput(Steered, WithScalings):
    """The output that one setting wrote, or was given."""

    index: int
    label: str | None
    text: str
    token_ids: list[int]
    tokens: Annotated[list[ComparedToken], Field(description="With log-probabilities under the output's own setting.")]
    finish_reason: Annotated[str | None, Field(description="null for an output that was given.")]


class LogLikelihood(TypedDict):
    """[settings, outputs], nats: row i judges column j. null where there are no tokens, or no time was left."""

    sum: list[list[float | None]]
    per_token: list[list[float | None]]


class CompareUsage(Usage):
    """The comparison's cost; the engine's numbers are those of the generation."""

    scored_tokens: int


class CompareAnswer(TypedDict):
    """The answer of POST /compare."""

    id: str
    model: str
    seed: int
    outputs: list[CompareOutput]
    log_likelihood: LogLikelihood
    usage: CompareUsage


class GateValues(TypedDict):
    """By PEFT's names."""

    scaling_pass_value: Annotated[float | None, Field(description="null is 1 / number of experts.")]
    top_k_lora: Annotated[int | None, Field(description="null is all.")]
    global_scaling_weight: float


class GateState(GateValues):
    """The gate settings of requests that arrive now, and those of the checkpoint."""

    checkpoint: GateValues


class LogState(TypedDict):
    """The scalings log: switch, bounds, and how full it is."""

    enabled: bool
    max_tokens: int
    max_bytes: int
    tokens: int
    bytes: int
    dropped_tokens: Annotated[int, Field(description="Pushed out by newer ones since the log was cleared.")]


class LogRows(TypedDict):
    """The rows of the scalings log: the classifier's, before top-k and steering."""

    sequences: Annotated[int, Field(description="Runs of consecutive positions of one choice.")]
    lengths: Annotated[dict[str, int], Field(description="How many runs there are of each length.")]
    totals: Annotated[dict[str, float] | None, Field(description="Mean weight of each expert.")]
    top1: Annotated[dict[str, float] | None, Field(description="Share of the positions at which it leads.")]


class LogSummary(LogState, LogRows):
    """And what its rows say: the classifier's, before top-k and steering."""


class Likelihood(TypedDict):
    """How likely the selected tokens are under one model."""

    perplexity: Annotated[float | None, Field(description="exp of the mean negative logprob.")]
    logprobs: Annotated[list[float | None], Field(description="Of each token, nats; null for the text's first.")]


class Perplexity(TypedDict):
    """Whether the gate chose well: where an expert alone or the base has the larger logprob, it did not."""

    xlora: Likelihood
    base: Likelihood
    experts: Annotated[dict[str, Likelihood], Field(description="Each selected expert alone, with weight 1.")]


class ScalingsGroups(TypedDict):
    """The gate by site, layer or module type: means over the selected positions and the group's selected sites."""

    granularity: str
    experts: list[str]
    names: Annotated[
        list[str],
        Field(description="A layer is named by its prefix (model.layers.0); a site outside any layer by itself."),
    ]
    mean: Annotated[Matrix, Field(description="[E] per group.")]
    entropy: Annotated[list[float | None], Field(description="Nats per group; null where every row is all-zero.")]
    top1: Annotated[
        list[list[float]], Field(description="[E] per group: share of the positions at which the expert leads.")
    ]


class OneText(TypedDict):
    """The gate's weights over one text, with a summary over the selected positions and sites."""

    tokens: list[TokenText]
    scalings: NotRequired[Annotated[Scalings, Field(description="With granularity token.")]]
    groups: NotRequired[Annotated[ScalingsGroups, Field(description="With any other granularity.")]]
    totals: Annotated[dict[str, float], Field(description="Mean weight of each expert over the text.")]
    top1: Annotated[dict[str, float], Field(description="Share of the positions at which the expert leads.")]
    entropy: Annotated[
        float | None, Field(description="Nats, mean over the positions; null where every row is all-zero.")
    ]
    perplexity: NotRequired[Annotated[Perplexity, Field(description="Where asked for.")]]


class TextScalings(OneText):
    """One text of several."""

    shares: Annotated[
        dict[str, float | None],
        Field(
            description="Mean over the positions of |w| / sum |w|, w a position's mean weights; divergence is of these."
        ),
    ]


class ScalingsUsage(TypedDict):
    """The cost of the scaling passes, over all texts."""

    prompt_tokens: int
    forward_passes: int
    scaling_rows: int


class ScalingsFrame(TypedDict):
    """The fields of every answer of POST /scalings around its texts."""

    id: str
    model: str
    usage: ScalingsUsage


class ScalingsAnswer(ScalingsFrame, OneText):
    """The answer of POST /scalings to one text."""


class ScalingsBatchAnswer(ScalingsFrame):
    """The answer of POST /scalings to a list of texts, in its order."""

    texts: list[TextScalings]
    divergence: Annotated[
        list[list[float | None]],
        Field(
            description="[texts, texts]: Jensen-Shannon divergence of two texts' shares over all experts, in nats: 0 "
            "where they are equal, ln 2 where no expert acts in both; null where every row of one text is all-zero."
        ),
    ]


class TokenizeAnswer(TypedDict):
    """The answer of POST /tokenize."""

    token_ids: list[int]
    tokens: list[TokenText]
    count: int
    max_model_len: int


class DetokenizeAnswer(TypedDict):
    """The answer of POST /detokenize."""

    text: str


class Status(TypedDict):
    """The answer of the probes."""

    status: str


class Health(Status):
    """The answer of GET /health."""

    model: str | None
    uptime_seconds: float
    requests_running: int
    requests_waiting: int


class DraftLayer(TypedDict):
    """The bundle's draft layer."""

    depth: Annotated[int, Field(description="Tokens that it drafts in one step, the scaling pass's own included.")]
    agreement: Annotated[
        list[float],
        Field(description="By depth: the share of drafts that came true on texts held out, where those before did."),
    ]


class Info(TypedDict):
    """The answer of GET /info."""

    model: str
    architecture: str
    dtype: str
    device: str
    versions: dict[str, str]
    experts: list[dict[str, str]]
    n_classes: int
    sites: list[str]
    n_layers: int
    xlora_config: dict[str, Any]
    dummy_row: Annotated[list[list[float]], Field(description="The checkpoint's gate of the scaling pass.")]
    gate: Annotated[GateState, Field(description="As GET /gate.")]
    limits: Annotated[dict[str, int], Field(description="max_model_len is the context, prompt and answer together.")]
    sampling_defaults: Annotated[
        dict[str, Any],
        Field(description="Values of absent fields where the operator has set others; max_tokens null: all that fits."),
    ]
    weights_sha256: Annotated[
        str | None, Field(description="Over all weight files; null until it is known, soon after the start.")
    ]
    gate_profile: dict[str, Any] | None
    draft_head: Annotated[
        int | None, Field(description="The width of the bundle's draft head; null where it has none.")
    ]
    draft_layer: Annotated[DraftLayer | None, Field(description="null where the bundle has none.")]


class ErrorDetail(TypedDict):
    """An error in OpenAI's shape, with a hint where there is one."""

    message: str
    type: str
    param: str | None
    code: str
    hint: NotRequired[str]


class ErrorAnswer(TypedDict):
    """The body of every error."""

    error: ErrorDetail
