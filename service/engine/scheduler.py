"""What runs in the next step. Pure Python, no torch: it moves numbers between sequences and the block manager.

One rule covers prefill, chunked prefill and decode: in each step a sequence's real stream advances over every
position whose scalings are known, and its scaling stream advances over the rest of tokens and drafts: prompt
chunk, sampled token, or draft tokens.

    prompt of 3 chunks   scaling  a b c . d e f      d: the drafted next token, in the same step as the real row before
                         real       a b c . d e f    it (lookahead scaling pass); with drafts of several tokens d, e, f
                                                     are several rows
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import islice

from service.engine.block_keys import BlockKeys
from service.engine.block_manager import BlockManager
from service.engine.plan import Plan, ScheduledSequence
from service.engine.sequence import LOOKAHEAD_RATE, LOOKUP_RATE, Sequence, Stream
from service.engine.speculation.costs import BreakEven, StepCost
from service.engine.speculation.drafters import ANY_TOKEN, Record
from service.engine.speculation.proposals import expected_prediction, look_up, lookahead_depth

_PRIORITY_STEP = 4  # requests that may arrive later and still come before each next choice of one
_STEPS_OF_NEEDS = 64  # after so many, what drafts must be worth is found anew
_MAX_PASSES = 16  # of smaller ones past one for which there is no room
_MAX_SEAT_SHARE = 0.75  # for the choices of one request


class Scheduler:
    """Decode before prefill, under a budget of rows per step and of blocks in all.

    First come, first served, but no one is served at everyone's expense: prompts share a step's rows evenly (none gets
    more than it needs), the further choices of a request let later requests pass, and do not take every seat.

    A sequence is admitted when blocks for all it has so far are free, in both streams; when the pool runs dry later,
    the latest arrival is preempted: its blocks are released and it is computed again when there is room. What is
    cached of a text (full blocks of accepted positions) is not computed again while it lasts.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        lookahead: bool,
        draft_rates: SequenceOf[float] = (LOOKAHEAD_RATE,),
        speculative_tokens: int = 0,
        prefix_cache: bool = True,
        step_cost: StepCost | None = None,
        max_scored_rows: int = 1024,
        dummy_row_key: bytes = b"",
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.lookahead = lookahead
        self.draft_rates = draft_rates  # what is expected of the scaling pass's drafts at depth 1, 2, ...
        self.speculative_tokens = speculative_tokens  # most drafts from earlier text per sequence and step
        self.prefix_cache = prefix_cache  # False: only choices of one request share blocks
        self._step_cost = StepCost() if step_cost is None else step_cost
        self.max_scored_rows = max_scored_rows  # whose logits are kept for prompt_logprobs, in one step
        self.dummy_row_key = dummy_row_key  # the checkpoint's dummy row, as a name for it
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self._keys = BlockKeys(blocks.block_size)
        self._needed = BreakEven([], [], [])  # in this step
        self._known_needs: dict[int, BreakEven] = {}  # by the number of sequences, for some steps
        self._steps = 0
        self._scorable = max_scored_rows  # what this step has left of them
        self._most_choices = max(1, math.ceil(_MAX_SEAT_SHARE * max_num_seqs))  # of one request at once
        self._requests = 0  # that have arrived
        self._lookahead = [Record(rate) for rate in draft_rates]  # of all sequences, by depth
        self._lookup = Record(LOOKUP_RATE)

    @property
    def step_cost(self) -> StepCost:
        """What a step costs; how many drafts are made depends on it."""
        return self._step_cost

    @step_cost.setter
    def step_cost(self, cost: StepCost) -> None:
        self._step_cost = cost
        self._known_needs.clear()

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. The caller has checked that it can fit an otherwise empty pool."""
        request = sequence.request
        gate = sequence.gate
        dummy_row = self.dummy_row_key if gate.dummy_row is None else gate.dummy_row
        scope = request.cache_salt if self.prefix_cache else (request.id, sequence.arrival_time)
        sequence.scaling.root = self._keys.root("scaling", scope, dummy_row)
        sequence.real.root = self._keys.root("real", scope, dummy_row, gate.weight, request.gate_key)
        self._requests += sequence.index == 0
        sequence.priority = self._requests + _PRIORITY_STEP * sequence.index
        sequence.look_ahead(
            [record.begin(sequence.prompt_len) for record in self._lookahead], self._lookup.begin(sequence.prompt_len)
        )
        insort(self.waiting, sequence, key=lambda other: other.priority)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and releases its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Lets nobody else find what a sequence has in the cache: it is not worth having."""
        self.blocks.forget(sequence.scaling.blocks, sequence.real.blocks)

    def has_work(self) -> bool:
        """Whether any sequence is queued or running."""
        return bool(self.running or self.waiting)

    def schedule(self) -> Plan:
        """Chooses the rows of the next step and makes sure that every one has its block."""
        plan = Plan()
        budget = self.max_num_batched_tokens
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            (decoding if sequence.prefilled else prefilling).append(sequence)
        self._scorable = self.max_scored_rows
        self._needed = self._needs(max(1, len(self.running)))
        others = 2 * len(decoding)  # rows: one of each stream for everyone before drafts for anyone
        others += self._kept_for_prompts(prefilling, budget - others)
        for sequence in decoding:
            others -= 2
            if self.speculative_tokens and budget > 0 and sequence.prefilled:  # not if it has been preempted
                self._look_up_drafts(sequence)
            budget -= self._schedule_running(sequence, min(max(1, budget - others), budget), plan)
        most = self._even_share(prefilling, budget)
        for sequence in prefilling:
            budget -= self._schedule_running(sequence, min(most, budget), plan)
        if not plan.preemptions:
            self._admit(budget, most, plan)
        return plan

    def _needs(self, sequences: int) -> BreakEven:
        """What drafts must be worth in a step of so many sequences, by what has become of those so far."""
        self._steps += 1
        if self._steps % _STEPS_OF_NEEDS == 0:
            self._known_needs.clear()
        if sequences not in self._known_needs:
            rates = [record.rate for record in self._lookahead]
            self._known_needs[sequences] = BreakEven.of(self._step_cost, sequences, rates, self.speculative_tokens)
        return self._known_needs[sequences]

    def commit(self, sequence: Sequence) -> None:
        """Caches the full blocks of what has been accepted; ends the scaling stream of a frozen gate."""
        if not sequence.generates:
            return
        size, known = self.blocks.block_size, len(sequence.tokens)
        scaling, real = sequence.scaling, sequence.real
        if known < size * (1 + min(scaling.cached, real.cached)) and not sequence.scaling_ended:
            return  # no block has become full
        full = min(scaling.computed, known) // size
        if full > scaling.cached:
            self._cache_blocks(scaling, sequence.tokens, full)
        full = min(sequence.final, sequence.gate_row_end) // size
        if full > real.cached:
            self._cache_blocks(real, sequence.tokens, full)
        if sequence.scaling_ended and scaling.blocks:
            self.blocks.release(scaling.blocks)

    def _kept_for_prompts(self, prefilling: list[Sequence], spare: int) -> int:
        """Rows, of those that decoding leaves, that drafts do not take either: half, where there is a prompt to run."""
        can_admit = len(self.running) < self.max_num_seqs and self.waiting and self._has_room(self.waiting[0])
        return max(0, spare // 2) if prefilling or can_admit else 0

    def _cache_blocks(self, stream: Stream, tokens: list[int], full: int) -> None:
        self._keys.extend(stream.keys, stream.root, tokens, full)
        for number in range(stream.cached, full):
            self.blocks.cache(stream.blocks[number], stream.keys[number])
        stream.cached = full

    def _even_share(self, prefilling: list[Sequence], budget: int) -> int:
        """The most rows that one prompt may have in this step, with a view to those that can be admitted."""
        if not prefilling and not self.waiting:
            return budget
        needs = [self._next_rows(sequence, budget).rows for sequence in prefilling]
        found = list(self.running)
        if self.waiting and self._has_room(self.waiting[0]):
            for sequence in islice(self.waiting, self.max_num_seqs - len(self.running)):
                if not self._must_wait(sequence, found):
                    found.append(sequence)
                    cached = self.blocks.block_size * len(self._find_prefix(sequence)[1])
                    needs.append(len(sequence.tokens) - cached)
        return even_share(needs, budget)

    def _has_room(self, sequence: Sequence) -> bool:
        positions = len(sequence.tokens)
        return self._missing(sequence, positions, positions) <= self.blocks.free

    def _schedule_running(self, sequence: Sequence, budget: int, plan: Plan) -> int:
        """Adds the sequence's rows to the plan. Returns its rows: 0 where there is no budget, or it was preempted."""
        if budget <= 0 or (plan.preemptions and sequence not in self.running):
            return 0
        one = self._next_rows(sequence, budget)
        if not one.rows or not self._make_room(one, plan):
            return 0
        plan.scheduled.append(one)
        plan.rows += one.rows
        self._scorable -= len(one.scores)
        return one.rows

    def _look_up_drafts(self, sequence: Sequence) -> None:
        """Adds draft tokens by prompt lookup where the text repeats itself, it pays, and no one is preempted for it."""
        needed = self._needed.one_stream if sequence.scaling_ended else self._needed.two_streams
        place, tokens = look_up(sequence, needed, self.speculative_tokens)
        if tokens:
            end = min(len(sequence.tokens) + place + len(tokens), sequence.draft_end)
            if self._missing(sequence, end, end) <= self.blocks.free:
                sequence.take_lookup(place, tokens)

    def _next_rows(self, sequence: Sequence, budget: int) -> ScheduledSequence:
        """Both streams' next positions within `budget` rows; the real stream first, for it is what brings tokens."""
        known = len(sequence.tokens)
        end = known + len(sequence.drafts) - sequence.scores_only
        scaling_start, real_start = sequence.scaling.computed, sequence.real.computed
        # Where the gate is frozen, every position's scalings are known.
        real_ready = end if scaling_start >= sequence.gate_end else scaling_start
        real_count = min(real_ready - real_start, budget) if sequence.generates else 0
        scoring = sequence.scored < sequence.score_end
        if scoring:
            real_count = min(real_count, max(0, sequence.scored - real_start) + self._scorable)
        scaling_count = min(min(end, sequence.gate_end) - scaling_start, budget - real_count)
        one = ScheduledSequence(sequence, scaling_start, scaling_count, real_start, real_count, 0, 0, [])
        if sequence.generates:
            one.samples = max(0, real_start + real_count - (known - 1))
            if scoring:
                one.scores = range(max(real_start, sequence.scored), min(one.real_end, sequence.score_end))
            if self.lookahead and scaling_start + scaling_count >= known:
                self._ask_predictions(one, known, end)
        return one

    def _ask_predictions(self, one: ScheduledSequence, known: int, drafts_end: int) -> None:
        """The scaling pass predicts the tokens of drafts, and drafts more behind the last where that pays."""
        sequence, end = one.sequence, one.scaling_end
        likelihood = sequence.likelihood(one.samples)  # their rows are run once this step's samples have agreed
        depth = lookahead_depth(sequence, likelihood, self._needed)
        if end < drafts_end or (depth and sequence.room_for_drafts > 0):
            end += 1
        start = max(known, one.scaling_start + 1)
        one.expected = [expected_prediction(sequence, place) for place in range(start - known, end - known)]
        while one.expected and one.expected[0] == ANY_TOKEN:
            del one.expected[0]
            start += 1
        one.predict_start, one.draft_depth = start, min(depth, sequence.room_for_drafts)

    def _missing(self, sequence: Sequence, scaling_end: int, real_end: int) -> int:
        """Blocks that both streams lack together for rows before these positions; gate rows live in the real one's."""
        missing = self.blocks.missing(sequence.scaling.blocks, self._scaling_extent(sequence, scaling_end))
        if sequence.generates:
            missing += self.blocks.missing(sequence.real.blocks, max(scaling_end, real_end))
        return missing

    def _scaling_extent(self, sequence: Sequence, end: int) -> int:
        """How many of `end` positions the scaling stream needs blocks for."""
        return 0 if sequence.scaling_ended else min(end, sequence.gate_end)

    def _make_room(self, one: ScheduledSequence, plan: Plan) -> bool:
        """Gives both streams the blocks their rows need, preempting if need be."""
        sequence = one.sequence
        size, scaling, real = self.blocks.block_size, sequence.scaling.blocks, sequence.real.blocks
        if one.scaling_end <= size * min(len(scaling), len(real)) and one.real_end <= size * len(real):
            return True
        while (missing := self._missing(sequence, one.scaling_end, one.real_end)) > self.blocks.free:
            planned = {id(one.sequence) for one in plan.scheduled}
            victim = next(other for other in reversed(self.running) if id(other) not in planned)
            self._preempt(victim)
            plan.preemptions += 1
            if victim is sequence:
                return False
        if missing:
            self.blocks.extend(sequence.scaling.blocks, self._scaling_extent(sequence, one.scaling_end))
            if sequence.generates:
                self.blocks.extend(sequence.real.blocks, max(one.scaling_end, one.real_end))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.priority = -1
        self.waiting.appendleft(sequence)

    def _admit(self, budget: int, most: int, plan: Plan) -> None:
        """Moves sequences from waiting to running while there are rows, seats and blocks, each with `most` rows.

        In order, but for those that must wait for other choices, and one for which there is no room: a few smaller ones
        may pass that, unless it has been running before.
        """
        position = 0
        large: Sequence | None = None
        while position < len(self.waiting) and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[position]
            if self._must_wait(sequence, self.running):
                position += 1
                continue
            scaling, real = self._find_prefix(sequence)
            positions = len(sequence.tokens)
            needed = self._missing(sequence, positions, positions) - len(scaling) - len(real)
            if needed + self.blocks.evictable(scaling + real) > self.blocks.free:
                if large is not None or sequence.started or sequence.passed >= _MAX_PASSES:
                    return
                large = sequence
                position += 1
                continue
            if large is not None:
                large.passed += 1
            del self.waiting[position]
            self.running.append(sequence)
            self._adopt(sequence, scaling, real)
            budget -= self._schedule_running(sequence, min(most, budget), plan)

    def _must_wait(self, sequence: Sequence, others: Iterable[Sequence]) -> bool:
        """Whether other choices of its request come first: they have their seats, or one is at work on the prompt that
        they share, and none is done.
        """
        if not sequence.generates or sequence.sampling.n == 1:
            return False
        siblings = [other for other in others if other.request is sequence.request]
        if len(siblings) >= self._most_choices:
            return True
        return bool(siblings) and all(sibling.real.computed < sibling.prompt_len for sibling in siblings)

    def _find_prefix(self, sequence: Sequence) -> tuple[list[int], list[int]]:
        """Cached blocks of both streams, equally many: a real row needs the scalings of its position, a scaling row
        writes them. A fixed gate has the real stream alone. The last position is computed in any case, for its logits.
        """
        if not sequence.generates:
            return [], []
        most = min(len(sequence.tokens) - 1, sequence.gate_row_end)
        if sequence.scored < sequence.score_end:
            most = min(most, sequence.scored)  # the logits of the others are still wanted
        most //= self.blocks.block_size
        real = self._find(sequence, sequence.real, most)
        if sequence.fixed_gate:
            return [], real
        scaling = self._find(sequence, sequence.scaling, len(real))
        return scaling, real[: len(scaling)]

    def _find(self, sequence: Sequence, stream: Stream, most: int) -> list[int]:
        self._keys.extend(stream.keys, stream.root, sequence.tokens, most)
        return self.blocks.find(stream.keys[:most])

    def _adopt(self, sequence: Sequence, scaling: list[int], real: list[int]) -> None:
        """Begins both streams with cached blocks."""
        for stream, blocks in ((sequence.scaling, scaling), (sequence.real, real)):
            stream.blocks = self.blocks.share(blocks)
            stream.cached = len(blocks)
            stream.computed = len(blocks) * self.blocks.block_size
        if not sequence.started:
            sequence.usage.cached_tokens = sequence.real.computed

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.scaling.blocks, sequence.real.blocks)
        sequence.rewind()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every block is held by exactly the sequences that list it."""
        self.blocks.check_integrity(
            table
            for sequence in (*self.running, *self.waiting)
            for table in (sequence.scaling.blocks, sequence.real.blocks)
        )


def even_share(needs: list[int], budget: int) -> int:
    """The largest share (at least 1) of `budget` that all can have, if those who need less take no more than that: all
    of it, where there is enough for everyone.
    """
    left = budget
    for number, need in enumerate(sorted(needs)):
        share = left // (len(needs) - number)
        if need > share:
            return max(1, share)
        left -= need
    return budget
