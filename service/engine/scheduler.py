"""What runs in the next step. Pure Python, no torch: it moves numbers between sequences and the block manager.

One rule covers prefill, chunked prefill and decode: in each step a sequence's real stream advances over every
position whose scalings are known, and its scaling stream advances over the next ones: prompt chunk, sampled token, or
draft.

    prompt of 3 chunks   scaling  a b c . d      d: the drafted next token, in the same step as the real row before it
                         real       a b c        (lookahead scaling pass, DECISIONS.md)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from service.engine.block_manager import BlockManager
from service.engine.sequence import Sequence


@dataclass(slots=True)
class Scheduled:
    """One sequence's share of a step: positions start .. start + count of either stream."""

    sequence: Sequence
    scaling_start: int
    scaling_count: int  # includes the drafted position, if any
    real_start: int
    real_count: int
    drafted: bool  # the last scaling row is position len(tokens), holding sequence.draft
    samples: bool  # the last real row is the last accepted position: its logits give the next token
    predicts: bool  # the last scaling row's logits give the next draft

    @property
    def rows(self) -> int:
        """Rows of the flat batch."""
        return self.scaling_count + self.real_count


@dataclass(slots=True)
class Plan:
    """One step."""

    scheduled: list[Scheduled] = field(default_factory=list)
    preemptions: int = 0


class Scheduler:
    """First come, first served, decode before prefill, under a budget of rows per step and of blocks in all.

    A sequence is admitted when blocks for all it has so far are free, in both streams; when the pool runs dry later,
    the latest arrival is preempted: its blocks are released and it is computed again when there is room.
    """

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, lookahead: bool
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.lookahead = lookahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. The caller has checked that it can fit an otherwise empty pool."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and releases its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def has_work(self) -> bool:
        """Whether any sequence is queued or running."""
        return bool(self.running or self.waiting)

    def schedule(self) -> Plan:
        """Chooses the rows of the next step and makes sure that every one has its block."""
        plan = Plan()
        budget = self.max_num_batched_tokens
        decoding = [sequence for sequence in self.running if sequence.scaling.computed >= sequence.prompt_len]
        for sequence in decoding:
            budget -= self._schedule_running(sequence, budget, plan)
        for sequence in [sequence for sequence in self.running if sequence.scaling.computed < sequence.prompt_len]:
            budget -= self._schedule_running(sequence, budget, plan)
        if not plan.preemptions:
            self._admit(budget, plan)
        return plan

    def _schedule_running(self, sequence: Sequence, budget: int, plan: Plan) -> int:
        """Adds the sequence's share to the plan. Returns its rows: 0 where there is no budget, or it was preempted."""
        if budget <= 0 or sequence not in self.running:
            return 0
        share = self._share(sequence, budget)
        if not self._make_room(sequence, share.scaling_start + share.scaling_count, plan):
            return 0
        plan.scheduled.append(share)
        return share.rows

    def _share(self, sequence: Sequence, budget: int) -> Scheduled:
        """Both streams' next positions within `budget` rows; the real stream first, for it is what brings tokens."""
        known = len(sequence.tokens)
        scaling_start, real_start = sequence.scaling.computed, sequence.real.computed
        real_count = min(scaling_start - real_start, budget) if sequence.generates else 0
        scaling_count = min(known - scaling_start, budget - real_count)
        samples = sequence.generates and real_count > 0 and real_start + real_count == known
        # A draft pays only if a row after it can use it: the last token needs no scalings, and no budget is exceeded.
        may_continue = sequence.generates and sequence.output_len + 1 < sequence.sampling.max_tokens
        drafted = (
            self.lookahead
            and samples
            and sequence.draft is not None
            and scaling_start == known
            and may_continue
            and real_count < budget
        )
        scaling_count += drafted
        reaches_frontier = scaling_count > 0 and scaling_start + scaling_count >= known
        predicts = self.lookahead and reaches_frontier and may_continue
        return Scheduled(sequence, scaling_start, scaling_count, real_start, real_count, drafted, samples, predicts)

    def _make_room(self, sequence: Sequence, positions: int, plan: Plan) -> bool:
        """Gives both streams blocks for `positions` (gate rows live in the real stream's), preempting if need be."""
        tables = self._tables(sequence)
        if all(positions <= len(table) * self.blocks.block_size for table in tables):
            return True
        while sum(self.blocks.missing(table, positions) for table in tables) > self.blocks.free:
            planned = {id(share.sequence) for share in plan.scheduled}
            victim = next(other for other in reversed(self.running) if id(other) not in planned)
            self._preempt(victim)
            plan.preemptions += 1
            if victim is sequence:
                return False
        for table in tables:
            self.blocks.extend(table, positions)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _admit(self, budget: int, plan: Plan) -> None:
        """Moves sequences from waiting to running while there are rows, seats and blocks, strictly in order."""
        position = 0
        while position < len(self.waiting) and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[position]
            sibling = self._sibling(sequence)
            if sibling is not None and sibling.real.computed < sibling.prompt_len:
                position += 1  # another choice of the same prompt is computing it: wait, and let others pass
                continue
            shared = self._shareable(sequence, sibling)
            needed = len(self._tables(sequence)) * (self.blocks.blocks_for(len(sequence.tokens)) - shared)
            if needed > self.blocks.free:
                return
            del self.waiting[position]
            self.running.append(sequence)
            if sibling is not None:
                self._share_prefix(sequence, sibling, shared)
            budget -= self._schedule_running(sequence, budget, plan)

    def _sibling(self, sequence: Sequence) -> Sequence | None:
        """A running choice of the same request."""
        if not sequence.generates or sequence.sampling.n == 1:
            return None
        return next((other for other in self.running if other.request is sequence.request), None)

    def _shareable(self, sequence: Sequence, sibling: Sequence | None) -> int:
        """Full blocks of the common prompt; its last position is computed by each choice, for its logits."""
        return 0 if sibling is None else (sequence.prompt_len - 1) // self.blocks.block_size

    def _share_prefix(self, sequence: Sequence, sibling: Sequence, shared: int) -> None:
        for stream, source in ((sequence.scaling, sibling.scaling), (sequence.real, sibling.real)):
            stream.blocks = self.blocks.share(source.blocks[:shared])
            stream.computed = shared * self.blocks.block_size
        sequence.usage.cached_tokens = max(sequence.usage.cached_tokens, sequence.real.computed)

    def _tables(self, sequence: Sequence) -> list[list[int]]:
        """The block tables the sequence needs: a scaling pass alone has no real stream."""
        return [sequence.scaling.blocks, sequence.real.blocks] if sequence.generates else [sequence.scaling.blocks]

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.scaling.blocks)
        self.blocks.release(sequence.real.blocks)
        sequence.rewind()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every block is held by exactly the sequences that list it."""
        self.blocks.check_integrity(
            table
            for sequence in (*self.running, *self.waiting)
            for table in (sequence.scaling.blocks, sequence.real.blocks)
        )
