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


class ScalingsAnswer(BaseModel):
    """The answer of POST /scalings."""

    id: str
    model: str
    tokens: list[TokenText]
    scalings: Scalings
    totals: dict[str, float] = Field(description="Mean weight of each expert over the text.")
    top1: dict[str, float] = Field(description="Share of the positions at which the expert leads.")
    usage: dict[str, int]


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
    dummy_row: list[list[float]]
    limits: dict[str, int]
    weights_sha256: str
    gate_profile: dict[str, Any] | None


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
