"""Scheduler: plans the rows of each step, admits and preempts sequences. Pure Python, no torch, no model.

One rule covers prefill, chunked prefill and decode: in each step a sequence's real stream advances over every
position whose scalings are known, and its scaling stream advances over the rest of tokens and drafts: prompt
chunk, sampled token, or draft tokens.

    scaling  a b c . d e f        a column is a step; a, b, c: chunks of the prompt; d, e, f: generated tokens
    real       a b c . d e f

The scaling row of a drafted token d runs in the same step as the real row before it (lookahead). With drafts of several
tokens, d, e and f stand for several rows each. A row is one position in one of the two streams.
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
from service.engine.sequence import LOOKAHEAD_RATE, Sequence, Stream
from service.engine.speculation.costs import BreakEven, StepCost
from service.engine.speculation.drafters import ANY_TOKEN
from service.engine.speculation.policy import DraftPolicy
from service.engine.speculation.proposals import expected_prediction, look_up, lookahead_depth

_PRIORITY_STEP = 4  # requests that may arrive later and still come before a request's next choice
_MAX_OVERTAKING = 16  # smaller sequences admitted before one that does not fit yet
_MAX_SLOT_FRACTION = 0.75  # of max_num_seqs, for the choices of one request


class Scheduler:
    """Schedules decode before prefill, within a budget of rows per step and the blocks of the pool.

    First come, first served, with two rules of fairness. Prompts divide the rows of a step evenly, though none gets
    more than it needs. Further choices of a request let a few later requests pass, and cannot fill all of max_num_seqs.

    A sequence is admitted when there are free blocks for all its tokens, in both streams. When blocks run out later,
    the running sequence that was admitted last, and has no rows in this step yet, is preempted: its blocks are
    released, and its tokens are computed again later, except those whose full blocks are still in the prefix cache.
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
        self.drafts = DraftPolicy(
            lookahead=lookahead, rates=draft_rates, speculative_tokens=speculative_tokens, cost=step_cost
        )
        self.prefix_cache = prefix_cache  # False: only choices of one request reuse each other's blocks
        self.max_scored_rows = max_scored_rows  # of a step: rows whose logits are kept for prompt_logprobs
        self.dummy_row_key = dummy_row_key  # identifies the checkpoint's dummy row in block keys
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self._keys = BlockKeys(blocks.block_size)
        self._needed = BreakEven([], [], [])  # in this step
        self._scorable = max_scored_rows  # rows of max_scored_rows that this step has left
        self._max_choices = max(1, math.ceil(_MAX_SLOT_FRACTION * max_num_seqs))  # of one request at once
        self._requests = 0  # arrived so far

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. The caller has checked that it fits an otherwise empty pool."""
        request = sequence.request
        gate = sequence.gate
        dummy_row = self.dummy_row_key if gate.dummy_row is None else gate.dummy_row
        scope = request.cache_salt if self.prefix_cache else (request.id, sequence.arrival_time)
        sequence.scaling.root = self._keys.root("scaling", scope, dummy_row)
        sequence.real.root = self._keys.root("real", scope, dummy_row, gate.weight, request.gate_key)
        self._requests += sequence.index == 0
        sequence.priority = self._requests + _PRIORITY_STEP * sequence.index
        self.drafts.begin(sequence)
        insort(self.waiting, sequence, key=lambda other: other.priority)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence from the queue or from the running ones, and releases its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Removes a sequence's blocks from the prefix cache, because their contents are not usable (NaN)."""
        self.blocks.forget(sequence.scaling.blocks, sequence.real.blocks)

    def has_work(self) -> bool:
        """Whether any sequence is queued or running."""
        return bool(self.running or self.waiting)

    def schedule(self) -> Plan:
        """Plans the rows of the next step, and allocates their blocks."""
        plan = Plan()
        budget = self.max_num_batched_tokens
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            (decoding if sequence.prefilled else prefilling).append(sequence)
        self._scorable = self.max_scored_rows
        self._needed = self.drafts.break_even(max(1, len(self.running)))
        others = 2 * len(decoding)  # rows reserved: every sequence gets a row of each stream before any gets drafts
        others += self._kept_for_prompts(prefilling, budget - others)
        for sequence in decoding:
            others -= 2
            if self.drafts.speculative_tokens and budget > 0 and sequence.prefilled:  # False once it has been preempted
                self._look_up_drafts(sequence)
            budget -= self._schedule_running(sequence, min(max(1, budget - others), budget), plan)
        max_rows = self._max_prompt_rows(prefilling, budget)
        for sequence in prefilling:
            budget -= self._schedule_running(sequence, min(max_rows, budget), plan)
        if not plan.preemptions:
            self._admit(budget, max_rows, plan)
        return plan

    def commit(self, sequence: Sequence) -> None:
        """Caches full blocks of accepted positions; releases the scaling stream once the gate is frozen."""
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
        """Rows that are reserved for prompts before drafts: half of the spare ones, if there is a prompt to run."""
        can_admit = len(self.running) < self.max_num_seqs and self.waiting and self._has_room(self.waiting[0])
        return max(0, spare // 2) if prefilling or can_admit else 0

    def _cache_blocks(self, stream: Stream, tokens: list[int], full: int) -> None:
        self._keys.extend(stream.keys, stream.root, tokens, full)
        for number in range(stream.cached, full):
            self.blocks.cache(stream.blocks[number], stream.keys[number])
        stream.cached = full

    def _max_prompt_rows(self, prefilling: list[Sequence], budget: int) -> int:
        """The fair share of one prompt in this step's rows, counting prompts that can be admitted in it."""
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
        return fair_share(needs, budget)

    def _has_room(self, sequence: Sequence) -> bool:
        positions = len(sequence.tokens)
        return self._missing(sequence, positions, positions) <= self.blocks.free

    def _schedule_running(self, sequence: Sequence, budget: int, plan: Plan) -> int:
        """Adds a sequence's rows to the plan. Returns how many: 0 without budget, or when it was preempted."""
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
        """Adds prompt-lookup drafts where the text repeats itself, they pay, and they need no preemption."""
        needed = self._needed.one_stream if sequence.scaling_ended else self._needed.two_streams
        place, tokens = look_up(sequence, needed, self.drafts.speculative_tokens)
        if tokens:
            end = min(len(sequence.tokens) + place + len(tokens), sequence.draft_end)
            if self._missing(sequence, end, end) <= self.blocks.free:
                sequence.take_lookup(place, tokens)

    def _next_rows(self, sequence: Sequence, budget: int) -> ScheduledSequence:
        """The next rows of both streams within `budget`; the real stream's first, because they yield tokens."""
        known = len(sequence.tokens)
        end = known + len(sequence.drafts) - sequence.scores_only
        scaling_start, real_start = sequence.scaling.computed, sequence.real.computed
        # With a frozen gate, the scalings of every position are known.
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
            if self.drafts.lookahead and scaling_start + scaling_count >= known:
                self._plan_predictions(one, known, end)
        return one

    def _plan_predictions(self, one: ScheduledSequence, known: int, end_of_drafts: int) -> None:
        """Adds the positions whose tokens the scaling pass predicts: those of drafts, to compare them, and the one
        behind the last draft where another pays.
        """
        sequence, end = one.sequence, one.scaling_end
        likelihood = sequence.likelihood(one.samples)  # this step's samples verify those drafts before the next is run
        depth = lookahead_depth(sequence, likelihood, self._needed)
        if end < end_of_drafts or (depth and sequence.room_for_drafts > 0):
            end += 1
        start = max(known, one.scaling_start + 1)
        one.expected = [expected_prediction(sequence, place) for place in range(start - known, end - known)]
        while one.expected and one.expected[0] == ANY_TOKEN:
            del one.expected[0]
            start += 1
        one.predict_start, one.draft_depth = start, min(depth, sequence.room_for_drafts)

    def _missing(self, sequence: Sequence, scaling_end: int, real_end: int) -> int:
        """Blocks that the streams still need for positions before these ends. The real stream also needs blocks up to
        the scaling end, because it holds the gate rows.
        """
        missing = self.blocks.missing(sequence.scaling.blocks, self._scaling_extent(sequence, scaling_end))
        if sequence.generates:
            missing += self.blocks.missing(sequence.real.blocks, max(scaling_end, real_end))
        return missing

    def _scaling_extent(self, sequence: Sequence, end: int) -> int:
        """Positions, of `end`, that the scaling stream needs blocks for."""
        return 0 if sequence.scaling_ended else min(end, sequence.gate_end)

    def _make_room(self, one: ScheduledSequence, plan: Plan) -> bool:
        """Allocates the blocks of a sequence's rows, preempting others, or the sequence itself, where they run out.
        Returns whether the sequence still runs.
        """
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

    def _admit(self, budget: int, max_rows: int, plan: Plan) -> None:
        """Moves sequences from waiting to running, with up to `max_rows` rows each, while budget, max_num_seqs and free
        blocks allow.

        In order of priority, with two exceptions: choices that must wait for another choice of their request are
        skipped, and one sequence that does not fit yet may be overtaken by up to _MAX_OVERTAKING smaller ones, unless
        it was preempted.
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
                if large is not None or sequence.started or sequence.overtaken >= _MAX_OVERTAKING:
                    return
                large = sequence
                position += 1
                continue
            if large is not None:
                large.overtaken += 1
            del self.waiting[position]
            self.running.append(sequence)
            self._take_prefix(sequence, scaling, real)
            budget -= self._schedule_running(sequence, min(max_rows, budget), plan)

    def _must_wait(self, sequence: Sequence, others: Iterable[Sequence]) -> bool:
        """Whether a choice waits for other choices of its request: as many as allowed are among `others`, or one of
        them is still computing the prompt, whose blocks this one can then reuse.
        """
        if not sequence.generates or sequence.sampling.n == 1:
            return False
        choices = [other for other in others if other.request is sequence.request]
        if len(choices) >= self._max_choices:
            return True
        return bool(choices) and all(choice.real.computed < choice.prompt_len for choice in choices)

    def _find_prefix(self, sequence: Sequence) -> tuple[list[int], list[int]]:
        """The cached prefix of a sequence: blocks of the scaling stream and of the real stream, equally many, because
        real rows need the gate rows that scaling rows write. With a fixed gate there are only real ones. The last
        position is never taken from the cache: its logits are needed.
        """
        if not sequence.generates:
            return [], []
        end = min(len(sequence.tokens) - 1, sequence.gate_row_end)
        if sequence.scored < sequence.score_end:
            end = min(end, sequence.scored)  # logits of later positions are still needed for prompt_logprobs
        max_blocks = end // self.blocks.block_size
        real = self._find(sequence, sequence.real, max_blocks)
        if sequence.fixed_gate:
            return [], real
        scaling = self._find(sequence, sequence.scaling, len(real))
        return scaling, real[: len(scaling)]

    def _find(self, sequence: Sequence, stream: Stream, max_blocks: int) -> list[int]:
        self._keys.extend(stream.keys, stream.root, sequence.tokens, max_blocks)
        return self.blocks.find(stream.keys[:max_blocks])

    def _take_prefix(self, sequence: Sequence, scaling: list[int], real: list[int]) -> None:
        """Begins both streams with cached blocks."""
        for stream, blocks in ((sequence.scaling, scaling), (sequence.real, real)):
            stream.blocks = self.blocks.hold(blocks)
            stream.cached = len(blocks)
            stream.computed = len(blocks) * self.blocks.block_size
        if not sequence.started:
            sequence.usage.cached_tokens = sequence.real.computed

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.scaling.blocks, sequence.real.blocks)
        sequence.rewind()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless the block manager agrees with the block tables of all sequences."""
        self.blocks.check_integrity(
            table
            for sequence in (*self.running, *self.waiting)
            for table in (sequence.scaling.blocks, sequence.real.blocks)
        )


def fair_share(needs: list[int], budget: int) -> int:
    """The max-min fair share of `budget`: the largest number (at least 1) that each may take, while those who need less
    take only what they need. All of `budget`, where it is enough for all needs.
    """
    left = budget
    for number, need in enumerate(sorted(needs)):
        share = left // (len(needs) - number)
        if need > share:
            return max(1, share)
        left -= need
    return budget
