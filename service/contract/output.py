"""The engine's outputs, one StepOutput per step: numbers, strings and bytes, no torch, no text.

Arrays travel as raw little-endian float32 bytes; their shape is in the field's comment (S sites, E experts).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal, TypeVar

from service.contract.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "abort", "error"]
_Number = TypeVar("_Number", int, float)


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
class DraftCounts:
    """Drafts that had rows, kept or dropped, by source and depth: how far a draft was from what it was made of. The
    first number of each list is of depth 1.
    """

    lookahead_kept: list[int] = field(
        default_factory=list
    )  # of the scaling pass, and of the draft layer from depth 2 on
    lookahead_dropped: list[int] = field(default_factory=list)
    lookup_kept: list[int] = field(default_factory=list)  # of prompt lookup
    lookup_dropped: list[int] = field(default_factory=list)

    def count(self, depth: int, *, is_lookup: bool, kept: bool) -> None:
        """Counts one draft."""
        if is_lookup:
            counts = self.lookup_kept if kept else self.lookup_dropped
        else:
            counts = self.lookahead_kept if kept else self.lookahead_dropped
        counts += [0] * (depth - len(counts))
        counts[depth - 1] += 1

    def add(self, other: DraftCounts) -> None:
        """More drafts."""
        self.lookahead_kept = _by_depth(self.lookahead_kept, other.lookahead_kept)
        self.lookahead_dropped = _by_depth(self.lookahead_dropped, other.lookahead_dropped)
        self.lookup_kept = _by_depth(self.lookup_kept, other.lookup_kept)
        self.lookup_dropped = _by_depth(self.lookup_dropped, other.lookup_dropped)

    @property
    def hits(self) -> int:
        """Lookahead drafts of every depth that were kept."""
        return sum(self.lookahead_kept)

    @property
    def misses(self) -> int:
        """Lookahead drafts of every depth that were dropped."""
        return sum(self.lookahead_dropped)

    @property
    def accepted(self) -> int:
        """Drafts from earlier text that were kept."""
        return sum(self.lookup_kept)

    @property
    def speculated(self) -> int:
        """All drafts from earlier text."""
        return sum(self.lookup_kept) + sum(self.lookup_dropped)


@dataclass(slots=True)
class SequenceUsage:
    """The cost of one choice so far. The caller may end a choice itself (a stop string), so every output has it: one
    live object in the engine's process, a snapshot across the border.
    """

    forward_passes: int = 0  # steps this sequence had a row in
    scaling_rows: int = 0
    real_rows: int = 0
    drafts: DraftCounts = field(default_factory=lambda: DraftCounts())
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
        """The failure that an exception means, raised while `what` happened."""
        if isinstance(error, InvalidRequestError):
            return cls(error.message, error.param)
        return cls(f"{what} ({type(error).__name__})")


@dataclass(slots=True)
class SequenceOutput:
    """The output of one step for one choice: tokens (none during prefill, several where drafts were right), gate rows,
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
    """Statistics of the gate over positions whose real row ran and was kept, each once (the metrics' input).

    A step may leave its positions to a later one; the step that ends a choice has reported all of that choice's.
    """

    prompt_entropy: bytes = b""  # float32 [positions], nats; NaN where a row sums to 0
    generated_entropy: bytes = b""  # float32 [positions]
    weight: list[float] = field(default_factory=list)  # [E], sum over positions of the site mean of p = |g| / sum |g|
    top1: list[int] = field(default_factory=list)  # [E], positions whose largest site-mean p is this expert's

    def add(self, other: GateStats) -> None:
        self.prompt_entropy += other.prompt_entropy
        self.generated_entropy += other.generated_entropy
        self.weight = _added(self.weight, other.weight)
        self.top1 = _added(self.top1, other.top1)


@dataclass(slots=True)
class LoggedRows:
    """The classifier's weights of consecutive positions of one choice: after softmax, before top-k and steering."""

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
    drafts: DraftCounts = field(default_factory=DraftCounts)
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


def _by_depth(one: list[int], other: list[int]) -> list[int]:
    """Sums at each depth; missing is 0."""
    return [a + b for a, b in zip_longest(one, other, fillvalue=0)]


def _added(one: list[_Number], other: list[_Number]) -> list[_Number]:
    """Element by element; an empty one is nothing."""
    return [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other
