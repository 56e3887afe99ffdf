"""What answers look like in the OpenAPI document. The hot paths write JSON from plain dictionaries instead."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class TokenText(BaseModel):
    """A token and the text it adds; "" while a character is unfinished."""

    id: int
    text: str


class Alternative(BaseModel):
    """One of the most likely tokens of a position, alone."""

    id: int
    text: str
    logprob: float


class Token(TokenText):
    """A generated token."""

    logprob: float | None = None
    top_logprobs: list[Alternative] | None = None


class Scalings(BaseModel):
    """Rows of the gate. Row i is of position start + i, and position p produced the token at position p + 1."""

    experts: list[str]
    sites: list[str]
    start: int
    mean: list[list[float]] = Field(description="[E] per position: mean over the sites, after softmax and top-k.")
    entropy: list[float | None] = Field(description="Nats per position, mean over the sites; null for an all-zero row.")
    full: str | None = Field(None, description="base64 of a .npy array [positions, sites, experts].")


class Lookahead(BaseModel):
    """Drafted scaling rows that were kept, and dropped."""

    hits: int
    misses: int


class Speculation(BaseModel):
    """Tokens drafted from earlier text, and how many of them were right."""

    tokens: int
    accepted: int


class Usage(BaseModel):
    """What the request cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    forward_passes: int
    scaling_rows: int
    real_rows: int
    lookahead: Lookahead
    speculation: Speculation


class Output(BaseModel):
    """One choice."""

    index: int
    text: str
    token_ids: list[int]
    tokens: list[Token]
    finish_reason: str | None
    scalings: Scalings | None = None


class GenerateAnswer(BaseModel):
    """The answer of POST /generate without stream."""

    id: str
    model: str
    seed: int
    experts: dict[str, Any] | None = Field(None, description="As in the request, where it is steered.")
    gate: dict[str, Any] | None = Field(None, description="As in the request, where it changes the gate.")
    outputs: list[Output]
    usage: Usage


class CompareOutput(BaseModel):
    """What one setting wrote, or was given."""

    index: int
    label: str | None
    experts: dict[str, Any] | None = Field(None, description="As in the request.")
    gate: dict[str, Any] | None = Field(None, description="As in the request.")
    text: str
    token_ids: list[int]
    tokens: list[Token] = Field(description="With log-probabilities under the output's own setting.")
    finish_reason: str | None = Field(description="null for an output that was given.")
    scalings: Scalings | None = None


class LogLikelihood(BaseModel):
    """[settings, outputs], nats: row i judges column j. null where there are no tokens, or no time was left."""

    sum: list[list[float | None]]
    per_token: list[list[float | None]]


class CompareUsage(Usage):
    """What the comparison cost; the engine's numbers are those of the generation."""

    scored_tokens: int


class CompareAnswer(BaseModel):
    """The answer of POST /compare."""

    id: str
    model: str
    seed: int
    outputs: list[CompareOutput]
    log_likelihood: LogLikelihood
    usage: CompareUsage


class GateValues(BaseModel):
    """By PEFT's names."""

    scaling_pass_value: float | None = Field(description="null is 1 / number of experts.")
    top_k_lora: int | None = Field(description="null is all.")
    global_scaling_weight: float


class GateState(GateValues):
    """What holds for requests that arrive now, and what the checkpoint says."""

    checkpoint: GateValues


class LogState(BaseModel):
    """The scalings log: switch, bounds, and how full it is."""

    enabled: bool
    max_tokens: int
    max_bytes: int
    tokens: int
    bytes: int
    dropped_tokens: int = Field(description="Pushed out by newer ones since the log was cleared.")


class LogSummary(LogState):
    """And what its rows say: the classifier's, before top-k and steering."""

    sequences: int = Field(description="Runs of consecutive positions of one choice.")
    lengths: dict[str, int] = Field(description="How many runs there are of each length.")
    totals: dict[str, float] | None = Field(description="Mean weight of each expert.")
    top1: dict[str, float] | None = Field(description="Share of the positions at which it leads.")


class Likelihood(BaseModel):
    """How likely the selected tokens are under one model."""

    perplexity: float | None = Field(description="exp of the mean negative logprob.")
    logprobs: list[float | None] = Field(description="Of each token, nats; null for the text's first.")


class Perplexity(BaseModel):
    """Whether the gate chose well: where an expert alone or the base has the larger logprob, it did not."""

    xlora: Likelihood
    base: Likelihood
    experts: dict[str, Likelihood] = Field(description="Each selected expert alone, with weight 1.")


class ScalingsGroups(BaseModel):
    """The gate by site, layer or module type: means over the selected positions and the group's selected sites."""

    granularity: str
    experts: list[str]
    names: list[str] = Field(
        description="A layer is named by its prefix (model.layers.0); a site outside any layer by itself."
    )
    mean: list[list[float]] = Field(description="[E] per group.")
    entropy: list[float | None] = Field(description="Nats per group; null where every row is all-zero.")
    top1: list[list[float]] = Field(description="[E] per group: share of the positions at which the expert leads.")


class GateSummary(BaseModel):
    """One text in a few numbers, over the selected positions and sites."""

    totals: dict[str, float] = Field(description="Mean weight of each expert over the text.")
    top1: dict[str, float] = Field(description="Share of the positions at which the expert leads.")
    entropy: float | None = Field(description="Nats, mean over the positions; null where every row is all-zero.")
    perplexity: Perplexity | None = Field(None, description="Where asked for.")


class TextScalings(GateSummary):
    """One text of several."""

    tokens: list[TokenText]
    scalings: Scalings | None = Field(None, description="With granularity token.")
    groups: ScalingsGroups | None = Field(None, description="With any other granularity.")
    shares: dict[str, float | None] = Field(
        description="Mean over the positions of |w| / sum |w|, w a position's mean weights; divergence is of these."
    )


class ScalingsAnswer(GateSummary):
    """The answer of POST /scalings to one text."""

    id: str
    model: str
    tokens: list[TokenText]
    scalings: Scalings | None = Field(None, description="With granularity token.")
    groups: ScalingsGroups | None = Field(None, description="With any other granularity.")
    usage: dict[str, int]


class ScalingsBatchAnswer(BaseModel):
    """The answer of POST /scalings to a list of texts, in its order."""

    id: str
    model: str
    texts: list[TextScalings]
    divergence: list[list[float | None]] = Field(
        description="[texts, texts]: Jensen-Shannon divergence of two texts' shares over all experts, in nats: 0 where "
        "they are equal, ln 2 where no expert acts in both; null where every row of one text is all-zero."
    )
    usage: dict[str, int] = Field(description="Sums over the texts.")


class TokenizeAnswer(BaseModel):
    """The answer of POST /tokenize."""

    token_ids: list[int]
    tokens: list[TokenText]
    count: int
    max_model_len: int


class DetokenizeAnswer(BaseModel):
    """The answer of POST /detokenize."""

    text: str


class Status(BaseModel):
    """The answer of the probes."""

    status: str


class Health(Status):
    """The answer of GET /health."""

    model: str | None
    uptime_seconds: float
    requests_running: int
    requests_waiting: int


class Info(BaseModel):
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
    dummy_row: list[list[float]] = Field(description="The checkpoint's gate of the scaling pass.")
    gate: GateState = Field(description="As GET /gate.")
    limits: dict[str, int]
    weights_sha256: str
    gate_profile: dict[str, Any] | None
    draft_head: int | None = Field(description="The width of the bundle's draft head; null where it has none.")


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's shape, with a hint where there is one."""

    message: str
    type: str
    param: str | None
    code: str
    hint: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDetail
