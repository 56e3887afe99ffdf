"""One choice of one request in the engine: its tokens and drafts, its two KV streams, how far each has come.

    tokens       prompt + accepted output, then drafts that are not verified yet
    real         rows run over positions whose scalings are known; from the last accepted position on they are sampled
    scaling      rows run over the rest of tokens and drafts

A draft that turns out wrong is cut off with everything after it: what was computed on it is overwritten later.
No torch.
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

# What is expected of drafts before any has been judged, where a bundle does not say.
LOOKAHEAD_RATE = 0.8
LOOKUP_RATE = 0.7
_NEVER = sys.maxsize  # a position that no text reaches


@dataclass(slots=True)
class Stream:
    """One KV stream: positions 0 .. computed - 1 have their keys and values in `blocks`."""

    blocks: BlockTable = field(default_factory=table_of)
    computed: int = 0
    root: bytes = b""  # names the stream before its first block (block_keys.py)
    keys: list[bytes] = field(default_factory=list)  # of its first full blocks; tokens never change, so neither do they
    cached: int = 0  # leading blocks that others can find

    def rewind(self) -> None:
        """Forgets what was computed; the blocks have been released."""
        self.computed = self.cached = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A choice. Position p holds (tokens + drafts)[p].

    Invariants: the scaling stream ends at `gate_end` (a frozen gate needs no more, a fixed one nothing at all),
    real.computed <= scaling.computed below it, and neither passes the last draft. A gate row is stored, in the slots of
    the real stream, for every position below scaling.computed, a fixed one for position 0. Positions below `reported`
    have had their gate row sent.
    """

    request: Request
    index: int
    tokens: list[int]
    prompt_len: int
    arrival_time: float  # seconds, monotonic
    gate: AdmittedGate = CHECKPOINT_GATE
    ends: frozenset[int] = frozenset()  # tokens that end it
    drafts: list[int] = field(default_factory=list)
    drafters: list[Drafter] = field(default_factory=list)  # whose each draft is
    scaling: Stream = field(default_factory=Stream)
    real: Stream = field(default_factory=Stream)
    reported: int = 0
    scored: int = 0  # prompt positions below it have had the logprob of the token after them sent
    output_counts: Counter[int] = field(default_factory=Counter)
    grammar: Cursor | None = None  # after the accepted output; None: any text
    usage: SequenceUsage = field(default_factory=SequenceUsage)
    started: bool = False  # has been scheduled at least once
    priority: int = 0  # its place in the queue (scheduler.py)
    dropped: bool = False  # the engine has let go of it; a step that was launched before may still have rows of it
    passed: int = 0  # later ones that were admitted because there was no room for this one
    lookahead: list[Drafter] = field(init=False)  # of the scaling pass, by depth from 1 on
    prompt_lookup: Record = field(init=False)  # of drafts from earlier text, at any depth
    verdicts: list[tuple[Drafter, bool]] = field(default_factory=list)  # drafts with rows, kept or dropped, not counted
    logged: int = 0  # positions below it have been taken for the scalings log, if they are to be
    unlogged: list[tuple[int, Any]] = field(default_factory=list)  # later ones: start, gate logits (scalings_log.py)
    drafts_end: bool = False  # no more are made: one may have made a row of the text not finite
    has_own_gate: bool = field(init=False)  # other than the checkpoint's, in any respect
    generates: bool = field(init=False)  # False for a scaling pass alone (POST /scalings): it has no real stream
    takes_argmax: bool = field(init=False)  # of the logits as they are, as long as there is no grammar
    scores_only: bool = field(init=False)  # its tokens are all given, and the last one needs no row
    score_end: int = field(init=False)  # ... and those below this will: 0 where nobody asked
    draft_end: int = field(init=False)  # positions from here on are never drafted: the last token of all needs no row
    fixed_gate: bool = field(init=False)  # there is no scaling stream at all
    gate_end: int = field(init=False)  # positions from here on use the gate row of the position before it, or of 0
    ngrams: NgramIndex = field(init=False)
    _lookup: list[Drafter] = field(default_factory=list)  # of prompt lookup, by depth, as far as they were needed
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
        asked = sampling is not None and sampling.prompt_logprobs is not None and self.index == 0
        self.score_end = self.prompt_len - 1 if asked else 0
        self.draft_end = 0 if sampling is None else self.prompt_len + sampling.max_tokens - 1
        generated_from = self.prompt_len if score_from is None else score_from
        self.gate_end = _NEVER if freeze_after is None else generated_from + freeze_after - 1
        self.fixed_gate = self.request.has_fixed_gate
        if self.fixed_gate:
            self.gate_end = 0
        self.ngrams = NgramIndex(self.tokens)
        self.look_ahead([Record(LOOKAHEAD_RATE, self.prompt_len)], Record(LOOKUP_RATE, self.prompt_len))

    @classmethod
    def of(
        cls,
        request: Request,
        index: int,
        arrival_time: float,
        gate: AdmittedGate = CHECKPOINT_GATE,
        eos_token_ids: Collection[int] = (),
    ) -> Sequence:
        """A fresh sequence of `request`, for a model with these end-of-text tokens."""
        tokens = list(request.prompt_token_ids)
        ends = frozenset() if request.sampling is None else request.sampling.ends(eos_token_ids)
        return cls(request, index, tokens, len(tokens), arrival_time, gate, ends)

    def look_ahead(self, lookahead: Iterable[Record], lookup: Record) -> None:
        """Says what is expected of drafts: of the scaling pass's at depth 1, 2, ..., and of those from earlier text."""
        self.lookahead = [Drafter(record, depth) for depth, record in enumerate(lookahead, start=1)]
        self.prompt_lookup = lookup

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters; only sequences that generate have them."""
        assert self.request.sampling is not None, "a scaling-pass-only sequence does not sample"
        return self.request.sampling

    @property
    def prompt_ids(self) -> array[int]:
        """The distinct token ids of the prompt, int64; found when first asked for."""
        if self._prompt_ids is None:
            self._prompt_ids = array("q", set(self.tokens[: self.prompt_len]))
        return self._prompt_ids

    @property
    def is_served(self) -> bool:
        """Whether it is what the metrics and the scalings log are about: text for somebody, not a look at the gate."""
        return self.generates and not self.scores_only

    @property
    def output_len(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def len_with_drafts(self) -> int:
        """Positions of tokens and drafts that need rows."""
        return len(self.tokens) + len(self.drafts) - self.scores_only

    @property
    def room_for_drafts(self) -> int:
        """Drafts that may still be added."""
        if self.drafts_end:
            return 0
        return self.draft_end - self.len_with_drafts

    @property
    def final(self) -> int:
        """Positions below it will never be computed otherwise, nor dropped: their gate rows may be reported."""
        return min(self.real.computed, len(self.tokens) - 1) if self.generates else self.scaling.computed

    @property
    def all_given_done(self) -> bool:
        """Whether a sequence that samples nothing has been scored, or its scaling pass has run, to its end."""
        return self.scored == self.score_end if self.generates else self.scaling.computed == self.prompt_len

    @property
    def scaling_ended(self) -> bool:
        """Whether the gate is frozen for good: the scaling stream is not needed any more."""
        return self.gate_end != _NEVER and self.gate_end <= min(self.scaling.computed, len(self.tokens))

    @property
    def gate_row_end(self) -> int:
        """Positions below it have a gate that follows from the text and the request's gate_key: they can be cached."""
        return _NEVER if self.fixed_gate else self.gate_end

    @property
    def prefilled(self) -> bool:
        """Whether the stream that goes first has passed the prompt."""
        return (self.real if self.fixed_gate else self.scaling).computed >= self.prompt_len

    def token_ids(self, start: int, end: int) -> list[int]:
        """Token ids of positions start .. end - 1."""
        known = len(self.tokens)
        tokens = self.tokens[start:end]
        return tokens if end <= known else tokens + self.drafts[max(0, start - known) : end - known]

    def rewind(self) -> None:
        """Forgets what was computed (its blocks have been released); the tokens stay and are computed again."""
        self.scaling.rewind()
        self.real.rewind()
        self.drafts.clear()
        self.drafters.clear()

    def likelihood(self, verified: int) -> float:
        """The probability, by their drafters' records, that all drafts are right once the first `verified` are."""
        likelihood = 1.0
        for drafter in self.drafters[verified:]:
            likelihood *= drafter.record.rate
        return likelihood

    # -- drafts are made, verified, dropped -------------------------------------------------------------------------

    def predict(self, start: int, predictions: list[int], expected: list[int], deeper: list[int]) -> None:
        """Takes the scaling pass's predictions for positions start, start + 1, ... that were compared with `expected`,
        and what the draft layer makes of the first that differs. A contradiction found here costs no step, the real
        pass's does.
        """
        for position, (token, other) in enumerate(zip(predictions, expected, strict=True), start):
            if other not in (token, ANY_TOKEN):
                place = position - len(self.tokens)
                if place < len(self.drafts):
                    self.drafters[place].record.judge(False)
                    self._cut(place)
                self.draft([token, *deeper], self.lookahead)
                return

    def take_lookup(self, place: int, tokens: list[int]) -> None:
        """Adds drafts that were looked up, to follow drafts[:place]."""
        self._cut(place)
        while len(self._lookup) < len(tokens):
            self._lookup.append(Drafter(self.prompt_lookup, len(self._lookup) + 1, is_lookup=True))
        self.draft(tokens, self._lookup)

    def draft(self, tokens: list[int], drafters: list[Drafter]) -> None:
        """Adds draft tokens, the first of the first drafter, as far as there is room and the grammar allows them: what
        it does not is never sampled.
        """
        tokens = tokens[: self.room_for_drafts]
        if self.grammar is not None and tokens:
            tokens = tokens[: max(0, self.grammar.fitting([*self.drafts, *tokens]) - len(self.drafts))]
        self.drafts += tokens
        self.drafters += drafters[: len(tokens)]
        for drafter in drafters[: len(tokens)]:
            drafter.record.used_at = len(self.tokens)

    def accept(self, token: int) -> bool:
        """Appends one sampled token. Returns whether it was drafted; a wrong draft is cut off with all that follow."""
        right = bool(self.drafts) and self.drafts[0] == token
        if self.drafts:
            self.drafters[0].record.judge(right)
        if right:
            del self.drafts[0]
            drafter = self.drafters.pop(0)
            if self._computed > len(self.tokens):
                self.verdicts.append((drafter, True))
        elif self.drafts:
            self._cut(0)
        self.tokens.append(token)
        self.output_counts[token] += 1
        if self.grammar is not None:
            self.grammar.accept(token)
        return right

    def reason_to_end(self, token: int) -> FinishReason | None:
        """Why it ends with `token`, which it has just accepted; None where it goes on."""
        if token in self.ends or (self.grammar is not None and self.grammar.finished):
            return "stop"
        return "length" if len(self.tokens) > self.draft_end else None

    def give_up_drafts(self) -> None:
        """Drops every draft."""
        self._cut(0)

    def retry_without_drafts(self, scaling_end: int, real_end: int) -> bool:
        """Gives up drafts for good where a step that came to these positions had rows of some; False: it had none.

        Where attention weighs hidden keys with 0, a draft whose numbers are not finite reaches the rows before it. So
        such a step does not count, and the next one shows whether the text itself is at fault.
        """
        if max(scaling_end, real_end) <= len(self.tokens):
            return False
        self.give_up_drafts()
        self.drafts_end = True
        return True

    @property
    def pending_drafts(self) -> int:
        """Drafts that no row has been run on."""
        return self.len_with_drafts - max(self._computed, len(self.tokens))

    @property
    def _computed(self) -> int:
        return max(self.scaling.computed, self.real.computed)

    def _cut(self, place: int) -> None:
        """Drops drafts[place:] and what was computed on them."""
        position = len(self.tokens) + place
        self.verdicts += [
            (drafter, False) for drafter in self.drafters[place : max(place, self._computed - len(self.tokens))]
        ]
        del self.drafts[place:], self.drafters[place:]
        self.scaling.computed = min(self.scaling.computed, position)
        self.real.computed = min(self.real.computed, position)
