"""One choice of one request in the engine: its tokens, its two KV streams, how far each has come. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from service.engine.request import Request, SamplingParams, SequenceUsage


@dataclass(slots=True)
class Stream:
    """One KV stream: positions 0 .. computed - 1 have their keys and values in `blocks`."""

    blocks: list[int] = field(default_factory=list)
    computed: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A choice. `tokens` is prompt + accepted output; position p holds tokens[p].

    Invariants: real.computed <= scaling.computed <= len(tokens), and a gate row is stored (in the slots of the real
    stream) for every position below scaling.computed. Positions below `reported` have had their gate row sent.
    `draft` is what the scaling pass predicts for position len(tokens), once scaling.computed == len(tokens).
    """

    request: Request
    index: int
    tokens: list[int]
    prompt_len: int
    arrival_time: float  # seconds, monotonic
    scaling: Stream = field(default_factory=Stream)
    real: Stream = field(default_factory=Stream)
    draft: int | None = None
    reported: int = 0
    output_counts: Counter[int] = field(default_factory=Counter)
    usage: SequenceUsage = field(default_factory=SequenceUsage)
    started: bool = False  # has been scheduled at least once
    generates: bool = field(init=False)  # False for a scaling pass alone (POST /scalings): it has no real stream

    def __post_init__(self) -> None:
        self.generates = self.request.sampling is not None

    @classmethod
    def of(cls, request: Request, index: int, arrival_time: float) -> Sequence:
        """A fresh sequence of `request`."""
        tokens = list(request.prompt_token_ids)
        return cls(request, index, tokens, len(tokens), arrival_time)

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters; only sequences that generate have them."""
        assert self.request.sampling is not None, "a scaling-pass-only sequence does not sample"
        return self.request.sampling

    @property
    def output_len(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    def rewind(self) -> None:
        """Forgets what was computed (its blocks have been released); the tokens stay and are computed again."""
        self.scaling.computed = self.real.computed = 0
        self.draft = None

    def append(self, token: int) -> None:
        """Accepts one generated token."""
        self.tokens.append(token)
        self.output_counts[token] += 1
