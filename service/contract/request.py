"""The engine's input: requests, as numbers and strings, so that they cross a process border without pickle."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from service.contract.steering import Steering

ReturnScalings = Literal["none", "mean", "full"]
_GREEDY_BELOW = 1e-5  # dividing by less overflows fp32


@dataclass(frozen=True, slots=True)
class FormLimits:
    """Bounds of what a JSON Schema does not bound itself; 0: none."""

    string_characters: int = 1024
    items: int = 32  # of an array, and properties of an object that no schema names
    digits: int = 20  # of a number


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """The grammar of a generated text, from its first token to its last: exactly one of grammar and expression."""

    grammar: str | None = None  # a text of this grammar, in llguidance's Lark
    regex: str | None = None  # a match of this expression
    param: str = "response_format"  # the field of the request that asks for it


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The caller's params, validated by the API. Names and meanings are OpenAI's; null has already become the default.

    Logits are changed in this order: logit_bias, repetition_penalty, presence and frequency penalty, form (what it
    forbids gets -inf), min_tokens (what ends the text gets -inf, unless the form allows nothing else), temperature,
    top_k, top_p, min_p. Stop strings are not here: they are text, and the engine knows none.
    """

    max_tokens: int
    min_tokens: int = 0  # so many come before any token or stop string that ends the text
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
    form: GrammarSpec | None = None  # EOS is allowed where the text may end, and where it must end it does, without EOS

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def needs_history(self) -> bool:
        """Whether what is in the text already changes the logits, or the caller does."""
        penalised = self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return self.repetition_penalty != 1.0 or penalised or bool(self.logit_bias) or self.min_tokens > 0

    @property
    def is_plain(self) -> bool:
        """Whether logits and temperature alone say how a token is drawn, but for a grammar."""
        is_filtered = bool(self.top_k) or self.top_p < 1.0 or bool(self.min_p)
        return not self.needs_history and (self.is_greedy or not is_filtered)

    def ends(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end a text, for a model with these end-of-text tokens."""
        return frozenset((*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)))


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
        """Key of everything that changes this request's gate: equal ones share the real stream's cached blocks.

        Freezing is not part of it, because frozen positions are never cached.
        """
        return () if self.steering is None else (self.steering,)

    @property
    def has_fixed_gate(self) -> bool:
        """Whether every position has the same gate row, known beforehand: then there is no scaling stream."""
        return self.steering is not None and self.steering.weights is not None
