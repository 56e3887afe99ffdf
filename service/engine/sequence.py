"""Sequence: one choice of one request in the engine, with its tokens, its drafts and its two KV streams.

    tokens       prompt and accepted output; drafts, which are not verified yet, follow
    scaling      the stream of scaling rows, which give each position its gate row; it runs ahead
    real         the stream of real rows, over positions whose gate row is known; the last ones are sampled

A wrong draft is dropped with all drafts after it; keys and values computed for them are overwritten later. No torch.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from service.contract.output import FinishReason, SequenceUsage
from service.contract.request import Request, SamplingParams
from service.engine.block_manager import BlockTable, table_of
from service.engine.gate.settings import CHECKPOINT_GATE, AdmittedGate
from service.engine.speculation.drafters import ANY_TOKEN, Drafter, Record
from service.engine.speculation.prompt_lookup import NgramIndex
from service.grammar import Cursor

# Expected acceptance rates of drafts before any has been verified, where a bundle states none.
LOOKAHEAD_RATE = 0.8
LOOKUP_RATE = 0.7
_NEVER = sys.maxsize  # a position beyond any text


@dataclass(slots=True)
class Stream:
    """One KV stream: positions 0 .. computed - 1 have their keys and values in `blocks`."""

    blocks: BlockTable = field(default_factory=table_of)
    computed: int = 0
    root: bytes = b""  # the key before its first block (block_keys.py)
    keys: list[bytes] = field(default_factory=list)  # of its first full blocks; final, because tokens are
    cached: int = 0  # leading blocks that are in the prefix cache

    def rewind(self) -> None:
        """Resets the stream after its blocks have been released."""
        self.computed = self.cached = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A choice of a request. Position p holds (tokens + drafts)[p].

    Invariants: the scaling stream ends at `gate_end` (a frozen gate needs no later rows, a fixed one none at all);
    before `gate_end`, real.computed <= scaling.computed; neither stream goes beyond the last draft. Every position
    below scaling.computed has a gate row, stored in the slots of the real stream; a fixed gate has one at position 0.
    """

    request: Request
    index: int
    tokens: list[int]
    prompt_len: int
    arrival_time: float  # seconds, monotonic
    gate: AdmittedGate = CHECKPOINT_GATE
    end_token_ids: frozenset[int] = frozenset()  # each ends it
    drafts: list[int] = field(default_factory=list)
    drafters: list[Drafter] = field(default_factory=list)  # the drafter of each draft
    scaling: Stream = field(default_factory=Stream)
    real: Stream = field(default_factory=Stream)
    reported: int = 0  # gate rows of positions below it have been read: they are in metrics and outputs
    scored: int = 0  # prompt positions below it have been scored: the logprob of the token after them was sent
    output_counts: Counter[int] = field(default_factory=Counter)
    grammar: Cursor | None = None  # the grammar's state after the accepted output; None: any text
    usage: SequenceUsage = field(default_factory=SequenceUsage)
    started: bool = False  # has been scheduled at least once
    priority: int = 0  # its place in the queue (scheduler.py)
    dropped: bool = False  # removed by the engine; a step that was launched before may still have rows of it
    overtaken: int = 0  # later sequences that were admitted first, because this one did not fit
    lookahead: list[Drafter] = field(init=False)  # of the scaling pass, by depth from 1 on
    prompt_lookup: Record = field(init=False)  # of prompt-lookup drafts, at any depth
    draft_outcomes: list[tuple[Drafter, bool]] = field(
        default_factory=list
    )  # kept or dropped; to be counted (outputs.py)
    logged: int = 0  # positions below it have been taken for the scalings log, if they are to be
    unlogged: list[tuple[int, Any]] = field(default_factory=list)  # later ones: start, gate logits (scalings_log.py)
    never_drafts: bool = False  # a draft may have made a row of the text not finite
    has_own_gate: bool = field(init=False)  # differs from the checkpoint's gate
    generates: bool = field(init=False)  # False for a scaling pass alone (POST /scalings): it has no real stream
    takes_argmax: bool = field(init=False)  # of unprocessed logits, unless it has a grammar
    scores_only: bool = field(init=False)  # all its tokens are given: it samples none, and the last one needs no row
    score_end: int = field(init=False)  # prompt positions below it are to be scored; 0 without prompt_logprobs
    draft_end: int = field(init=False)  # positions from here on are never drafted: the very last token needs no row
    fixed_gate: bool = field(init=False)  # there is no scaling stream
    gate_end: int = field(init=False)  # positions from here on use the gate row of the position before it, or of 0
    ngrams: NgramIndex = field(init=False)
    _lookup: list[Drafter] = field(default_factory=list)  # of prompt lookup, by depth, created when needed
    _prompt_ids: array[int] | None = None

    def __post_init__(self) -> None:
        freeze_after = self.request.freeze_after
        sampling = self.request.sampling
        score_from = self.request.score_from
        self.has_own_gate = self.gate != CHECKPOINT_GATE or self.request.steering is not None
        self.generates = sampling is not None
        self.takes_argmax = sampling is not None and sampling.is_greedy and not sampling.needs_history
        self.scores_only = score_from is not None
        self.scored = 0 if score_from is None else score_from - 1
        is_scored = sampling is not None and sampling.prompt_logprobs is not None and self.index == 0
        self.score_end = self.prompt_len - 1 if is_scored else 0
        self.draft_end = 0 if sampling is None else self.prompt_len + sampling.max_tokens - 1
        generated_from = self.prompt_len if score_from is None else score_from
        self.gate_end = _NEVER if freeze_after is None else generated_from + freeze_after - 1
        self.fixed_gate = self.request.has_fixed_gate
        if self.fixed_gate:
            self.gate_end = 0
        self.ngrams = NgramIndex(self.tokens)
        self.set_records([Record(LOOKAHEAD_RATE, self.prompt_len)], Record(LOOKUP_RATE, self.prompt_len))

    @classmethod
    def of(
        cls,
        request: Request,
        index: int,
        arrival_time: float,
        gate: AdmittedGate = CHECKPOINT_GATE,
        eos_token_ids: Collection[int] = (),
    ) -> Sequence:
        """A new sequence of `request`, for a model with these end-of-text tokens."""
        tokens = list(request.prompt_token_ids)
        ends = frozenset() if request.sampling is None else request.sampling.ends(eos_token_ids)
        return cls(request, index, tokens, len(tokens), arrival_time, gate, ends)

    def set_records(self, lookahead: Iterable[Record], lookup: Record) -> None:
        """Sets the records of drafters: of the scaling pass at depth 1, 2, ..., and of prompt lookup."""
        self.lookahead = [Drafter(record, depth) for depth, record in enumerate(lookahead, start=1)]
        self.prompt_lookup = lookup

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters of a sequence that generates."""
        assert self.request.sampling is not None, "a scaling-pass-only sequence does not sample"
        return self.request.sampling

    @property
    def prompt_ids(self) -> array[int]:
        """The distinct token ids of the prompt, int64."""
        if self._prompt_ids is None:
            self._prompt_ids = array("q", set(self.tokens[: self.prompt_len]))
        return self._prompt_ids

    @property
    def is_served(self) -> bool:
        """Whether metrics and scalings log cover it: it generates text, and does not only scale or score."""
        return self.generates and not self.scores_only

    @property
    def output_len(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def len_with_drafts(self) -> int:
        """Positions, of tokens and drafts, that need rows."""
        return len(self.tokens) + len(self.drafts) - self.scores_only

    @property
    def room_for_drafts(self) -> int:
        """Drafts that may still be added."""
        if self.never_drafts:
            return 0
        return self.draft_end - self.len_with_drafts

    @property
    def final(self) -> int:
        """The number of final positions: computed, and never dropped. Their gate rows may be reported."""
        return min(self.real.computed, len(self.tokens) - 1) if self.generates else self.scaling.computed

    @property
    def is_fully_computed(self) -> bool:
        """Whether a sequence that samples nothing has been scored, or its scaling pass has run, to the end."""
        return self.scored == self.score_end if self.generates else self.scaling.computed == self.prompt_len

    @property
    def scaling_ended(self) -> bool:
        """Whether the gate is frozen, and the scaling stream not needed any more."""
        return self.gate_end != _NEVER and self.gate_end <= min(self.scaling.computed, len(self.tokens))

    @property
    def gate_row_end(self) -> int:
        """Positions below it can be cached: their gate is determined by the tokens and the request's gate_key."""
        return _NEVER if self.fixed_gate else self.gate_end

    @property
    def prefilled(self) -> bool:
        """Whether the leading stream (scaling; real with a fixed gate) has passed the prompt."""
        return (self.real if self.fixed_gate else self.scaling).computed >= self.prompt_len

    def token_ids(self, start: int, end: int) -> list[int]:
        """Token ids of positions start .. end - 1."""
        known = len(self.tokens)
        tokens = self.tokens[start:end]
        return tokens if end <= known else tokens + self.drafts[max(0, start - known) : end - known]

    def rewind(self) -> None:
        """Resets both streams after their blocks have been released; the tokens stay, and are computed again."""
        self.scaling.rewind()
        self.real.rewind()
        self.drafts.clear()
        self.drafters.clear()

    def likelihood(self, verified: int) -> float:
        """The expected probability that all drafts are right, given that the first `verified` are."""
        likelihood = 1.0
        for drafter in self.drafters[verified:]:
            likelihood *= drafter.record.rate
        return likelihood

    # -- drafts are made, verified, dropped -------------------------------------------------------------------------

    def predict(self, start: int, predictions: list[int], expected: list[int], deeper: list[int]) -> None:
        """Compares the scaling pass's predictions for positions start, start + 1, ... with `expected`. The first that
        differs replaces the draft of its position and all later ones, and `deeper`, the draft layer's tokens, follow
        it. This drops a wrong draft a step before the real pass would.
        """
        for position, (token, other) in enumerate(zip(predictions, expected, strict=True), start):
            if other not in (token, ANY_TOKEN):
                place = position - len(self.tokens)
                if place < len(self.drafts):
                    self.drafters[place].record.update(False)
                    self._drop_drafts(place)
                self.draft([token, *deeper], self.lookahead)
                return

    def take_lookup(self, place: int, tokens: list[int]) -> None:
        """Replaces drafts[place:] with prompt-lookup drafts."""
        self._drop_drafts(place)
        while len(self._lookup) < len(tokens):
            self._lookup.append(Drafter(self.prompt_lookup, len(self._lookup) + 1, is_lookup=True))
        self.draft(tokens, self._lookup)

    def draft(self, tokens: list[int], drafters: list[Drafter]) -> None:
        """Adds draft tokens, one of each drafter, as far as there is room and the grammar allows them."""
        tokens = tokens[: self.room_for_drafts]
        if self.grammar is not None and tokens:
            tokens = tokens[: max(0, self.grammar.fitting([*self.drafts, *tokens]) - len(self.drafts))]
        self.drafts += tokens
        self.drafters += drafters[: len(tokens)]
        for drafter in drafters[: len(tokens)]:
            drafter.record.used_at = len(self.tokens)

    def accept(self, token: int) -> bool:
        """Appends a sampled token. Returns whether it was drafted; if not, all drafts are dropped."""
        right = bool(self.drafts) and self.drafts[0] == token
        if self.drafts:
            self.drafters[0].record.update(right)
        if right:
            del self.drafts[0]
            drafter = self.drafters.pop(0)
            if self._computed > len(self.tokens):
                self.draft_outcomes.append((drafter, True))
        elif self.drafts:
            self._drop_drafts(0)
        self.tokens.append(token)
        self.output_counts[token] += 1
        if self.grammar is not None:
            self.grammar.accept(token)
        return right

    def finish_reason(self, token: int) -> FinishReason | None:
        """Why it ends with `token`, which it has just accepted; None if it goes on."""
        if token in self.end_token_ids or (self.grammar is not None and self.grammar.finished):
            return "stop"
        return "length" if len(self.tokens) > self.draft_end else None

    def give_up_drafts(self) -> None:
        """Drops every draft."""
        self._drop_drafts(0)

    def retry_without_drafts(self, scaling_end: int, real_end: int) -> bool:
        """Called when a step that ended at these positions was not finite. If it had rows of drafts, stops drafting for
        good and returns True: the step is to be repeated. Returns False if it had none, so the text itself is at fault.

        Attention may multiply masked values by 0, and 0 * NaN is NaN, so a draft that is not finite spoils earlier
        rows.
        """
        if max(scaling_end, real_end) <= len(self.tokens):
            return False
        self.give_up_drafts()
        self.never_drafts = True
        return True

    @property
    def pending_drafts(self) -> int:
        """Drafts that have not been computed in any stream."""
        return self.len_with_drafts - max(self._computed, len(self.tokens))

    @property
    def _computed(self) -> int:
        return max(self.scaling.computed, self.real.computed)

    def _drop_drafts(self, place: int) -> None:
        """Drops drafts[place:], and rewinds both streams to before them."""
        position = len(self.tokens) + place
        self.draft_outcomes += [
            (drafter, False) for drafter in self.drafters[place : max(place, self._computed - len(self.tokens))]
        ]
        del self.drafts[place:], self.drafters[place:]
        self.scaling.computed = min(self.scaling.computed, position)
        self.real.computed = min(self.real.computed, position)
