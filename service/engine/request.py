"""What crosses the border of the engine: requests in, one StepOutput per step out. Plain data, no torch, no text.

Every class here is a dataclass of numbers, strings and bytes, so that it crosses a process border without pickle.
Arrays travel as raw little-endian float32 bytes; their shape is in the field's comment (S sites, E experts).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

from service.errors import InvalidRequestError

ReturnScalings = Literal["none", "mean", "full"]
FinishReason = Literal["stop", "length", "abort", "error"]
_Number = TypeVar("_Number", int, float)
_GREEDY_BELOW = 1e-5  # dividing by less overflows fp32


@dataclass(frozen=True, slots=True)
class TextForm:
    """What a generated text must be, from its first token to its last: exactly one of the two."""

    json_schema: str | None = None  # JSON that fits this schema
    regex: str | None = None  # a match of this expression


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The caller's wishes, validated by the API. Names and meanings are OpenAI's; null has already become the default.

    Logits are changed in this order: logit_bias, repetition_penalty, presence and frequency penalty, form (what it
    forbids gets -inf), temperature, top_k, top_p, min_p. Stop strings are not here: they are text, and the engine knows
    none.
    """

    max_tokens: int = 128
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in CTRL and transformers
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0  # 0 .. 2**63 - 1; the API draws one where the caller gave none
    logprobs: int | None = None  # alternatives per token; 0 = the sampled token's own; None = none at all
    prompt_logprobs: int | None = None  # the same for the prompt's own tokens, its first excepted
    n: int = 1
    form: TextForm | None = None  # EOS is allowed where the text may end, and where it must end it does, without EOS

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def needs_history(self) -> bool:
        """Whether what is in the text already changes the logits, or the caller does."""
        penalised = self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return self.repetition_penalty != 1.0 or penalised or bool(self.logit_bias)


@dataclass(frozen=True, slots=True)
class GateWeight:
    """The weight of one expert in a fixed gate, at every site or at those of some layers."""

    expert: int  # its place in EngineInfo.experts
    weight: float  # finite, from -100 to 100; 1 is the expert as it was trained
    layers: tuple[int, int] | None = None  # the first and the last layer, both included; None = every site


@dataclass(frozen=True, slots=True)
class Steering:
    """What a caller wants otherwise about the gate of the real pass; nothing here changes the scaling pass.

    Experts are given by their place in EngineInfo.experts. `only` and `exclude` together leave the experts of `only`
    that are not in `exclude`; those left out are at -inf before the softmax (at 0 where the checkpoint has none), then
    top-k comes as usual. Where nobody is left, this is the base model.

    `weights` is a fixed gate: no classifier runs, experts that are not named are 0, and of several entries that cover a
    site and an expert the last counts. Top-k does not apply to it, global_scaling_weight does. It goes with nothing
    else of this class; weights=() is the base model.
    """

    only: tuple[int, ...] | None = None  # None = all
    exclude: tuple[int, ...] = ()
    weights: tuple[GateWeight, ...] | None = None
    temperature: float | None = None  # > 0; in place of softmax_temperature
    top_k: int | None = None  # 1 .. number of experts, which switches it off; in place of top_k_lora


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What an operator may change at run time, by PEFT's names; it holds for the requests that are admitted later."""

    scaling_pass_value: float | None  # None = 1 / number of experts
    top_k_lora: int | None  # None = all experts act
    global_scaling_weight: float


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. With `sampling` None it is a scaling pass alone (POST /scalings): gate rows, no tokens.

    With `score_from` nothing is generated either: the log-probabilities of the prompt's tokens from that one on are
    wanted (at least one, and never the first), as if they had been generated. `sampling` then has max_tokens 0 and
    says with how many alternatives (prompt_logprobs).
    """

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams | None
    return_scalings: ReturnScalings = "none"
    scalings_start: int | None = None  # first position whose row is returned; None = len(prompt) - 1
    cache_salt: str = ""  # only requests of the same salt find each other's KV blocks
    freeze_after: int | None = None  # from generated token n + 1 on, the gate row that produced token n is used
    steering: Steering | None = None
    score_from: int | None = None  # position of the first token to be scored; freezing counts from it

    @property
    def num_choices(self) -> int:
        """How many the engine will speak of; a scaling pass alone counts as one."""
        return 1 if self.sampling is None else self.sampling.n

    @property
    def gate_key(self) -> tuple[object, ...]:
        """What changes this request's gate: the real stream's cached blocks are shared where it is equal.

        Freezing is not part of it, because frozen positions are never cached.
        """
        return () if self.steering is None else (self.steering,)

    @property
    def has_fixed_gate(self) -> bool:
        """Whether every position has the same gate row, known beforehand: then there is no scaling stream."""
        return self.steering is not None and self.steering.weights is not None


@dataclass(slots=True)
class GateRows:
    """Scalings of `count` consecutive positions, after softmax and top-k: what really weighted the experts."""

    start: int  # position of the first row
    count: int
    mean: bytes  # float32 [count, E], mean over sites
    entropy: bytes  # float32 [count], nats, mean over sites; NaN where a row sums to 0
    full: bytes | None = None  # float32 [count, S, E], only for return_scalings == "full"


@dataclass(slots=True)
class TokenOutput:
    """One accepted token. Logprobs are natural logs of the raw distribution (before bias, penalties, temperature)."""

    id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)  # best first


@dataclass(slots=True)
class SequenceUsage:
    """What one choice has cost so far. The caller may end a choice itself (a stop string), so every output has it: one
    live object in the engine's process, a snapshot across the border.
    """

    forward_passes: int = 0  # steps this sequence had a row in
    scaling_rows: int = 0
    real_rows: int = 0
    draft_hits: int = 0  # tokens drafted by the scaling pass, computed, and kept
    draft_misses: int = 0  # ... and dropped
    speculated_tokens: int = 0  # tokens copied from earlier text as a draft, computed, and kept or dropped
    accepted_tokens: int = 0  # ... and kept
    cached_tokens: int = 0  # prompt positions not computed because another choice or request had
    queue_seconds: float = 0.0  # submission to first scheduled step
    gate_positions: int = 0  # that produced tokens, have a leader, and were summarised; a choice that the engine has
    # ended has all of them here, one that the caller ends (a stop string) perhaps not the latest
    gate_entropy_sum: float = 0.0  # over those, nats
    gate_share_sum: list[float] = field(default_factory=list)  # [E], over those, of the site mean of p

    def add_gate(self, positions: int, entropy_sum: float, share_sum: list[float]) -> None:
        """More positions, with the sums over them."""
        self.gate_positions += positions
        self.gate_entropy_sum += entropy_sum
        self.gate_share_sum = _added(self.gate_share_sum, share_sum)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one sequence cannot go on."""

    message: str
    param: str | None = None  # the field of the request that is to blame; None: it is our fault

    @classmethod
    def of(cls, error: Exception, what: str) -> Failure:
        """What an exception comes to, raised while `what` happened."""
        if isinstance(error, InvalidRequestError):
            return cls(error.message, error.param)
        return cls(f"{what} ({type(error).__name__})")


@dataclass(slots=True)
class SequenceOutput:
    """What one step brought one choice: tokens (none during prefill, several where drafts were right), gate rows,
    perhaps the end.
    """

    request_id: str
    index: int  # which of the n choices
    tokens: list[TokenOutput] = field(default_factory=list)
    gate: GateRows | None = None
    prompt_logprobs: list[TokenOutput] = field(default_factory=list)  # choice 0 only: the prompt's next tokens, in
    # order of position from 1 on, complete with the choice's first token
    finish_reason: FinishReason | None = None
    usage: SequenceUsage | None = None
    error: str | None = None  # with finish_reason "error"
    error_param: str | None = None  # the field of the request that is to blame; None: it is our fault


@dataclass(slots=True)
class GateStats:
    """What the gate did over positions whose real row ran and was kept, each once (the metrics' input).

    A step may leave its positions to a later one; the step that ends a choice has reported all of that choice's.
    """

    prompt_entropy: bytes = b""  # float32 [positions], nats; NaN where a row sums to 0
    generated_entropy: bytes = b""  # float32 [positions]
    weight: list[float] = field(default_factory=list)  # [E], sum over positions of the site mean of p = |g| / sum |g|
    top1: list[int] = field(default_factory=list)  # [E], positions whose largest site-mean p is this expert's

    def add(self, other: GateStats) -> None:
        """More positions."""
        self.prompt_entropy += other.prompt_entropy
        self.generated_entropy += other.generated_entropy
        self.weight = _added(self.weight, other.weight)
        self.top1 = _added(self.top1, other.top1)


@dataclass(slots=True)
class LoggedRows:
    """What the classifier said of consecutive positions of one choice: after softmax, before top-k and steering."""

    request_id: str
    index: int
    start: int  # position of the first row
    count: int
    rows: bytes  # float32 [count, S, E]; S is 1 where all sites share a row


@dataclass(slots=True)
class StepStats:
    """One step of the engine, for metrics. Without rows it is only the load, as an abort has left it."""

    step_seconds: float = 0.0
    scaling_rows: int = 0
    real_rows: int = 0
    draft_hits: int = 0
    draft_misses: int = 0
    speculated_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    gate: GateStats = field(default_factory=GateStats)
    logged: list[LoggedRows] = field(default_factory=list)  # while the scalings log is on


@dataclass(slots=True)
class StepOutput:
    """Everything one Engine.step() brought, in one message."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    stats: StepStats = field(default_factory=StepStats)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the loaded engine is; the API's /info and its limits come from here."""

    model: str  # the bundle's name
    architecture: str  # "LlamaForCausalLM"
    dtype: str  # "float32"
    device: str  # "cpu", "cuda:0 (NVIDIA H200)"
    experts: list[dict[str, str]]  # [{"name", "description"}] in class order
    sites: list[str]
    xlora_config: dict[str, object]
    dummy_row: list[list[float]]  # [S, E] gate of the scaling pass
    vocab_size: int
    eos_token_ids: list[int]
    max_model_len: int  # tokens, prompt + output
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_blocks_total: int
    kv_bytes: int
    weights_sha256: str
    versions: dict[str, str]
    tokenizer_path: str  # tokenizer.json of the base
    gate_profile: dict[str, object] | None = None
    draft_head: int | None = None  # its width


def _added(one: list[_Number], other: list[_Number]) -> list[_Number]:
    """Element by element; an empty one is nothing."""
    return [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other
