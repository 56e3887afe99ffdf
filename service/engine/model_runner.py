"""A plan in, tokens and gate rows out: builds the flat batch, runs the model once, samples. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor

from service.engine.gate_report import GateObserver, gate_rows, report_spans
from service.engine.request import GateRows, GateStats, TokenOutput
from service.engine.sampler import SampleRow, sample, token_outputs
from service.engine.scheduler import Plan, Scheduled
from service.engine.sequence import Sequence, Stream
from service.model.batch import AttentionGroup, Batch
from service.model.compiled import CompiledStep
from service.model.cuda_graph import CapturedSteps
from service.model.gate_stats import summarise
from service.model.kv_cache import KVCache
from service.model.transfer import to_device
from service.model.xlora_model import ForwardOutput, XLoraModel

_MOST_SPLIT_ROWS = 16  # longer segments are not worth gathering their keys once per row
_MOST_SHARED_QUERIES = 16  # longer segments have an attention call each: their keys are not padded


@dataclass(slots=True)
class RunResult:
    """What one step brought, aligned with the plan's `scheduled`."""

    tokens: list[list[TokenOutput]]  # sampled from the real rows, first position first
    predictions: list[list[int]]  # sampled from the scaling rows
    scalings: list[Tensor | None]  # [scaling_count, S, E] of a scaling pass alone: they are stored nowhere


@dataclass(frozen=True, slots=True)
class _Segment:
    """`count` consecutive positions of one stream of one scheduled sequence: rows of the flat batch from `row` on."""

    share: Scheduled
    stream: Stream
    start: int
    count: int
    is_scaling: bool
    row: int = 0


class ModelRunner:
    """Owns the model and the KV cache, on one device."""

    def __init__(self, model: XLoraModel, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.block_size = kv_cache.block_size
        self.compiled: CompiledStep | None = None  # on a CPU, once it is there
        self.captured: CapturedSteps | None = None  # on CUDA
        self._observer = GateObserver(len(model.sites))

    def run(self, plan: Plan) -> RunResult:
        """One forward over everything scheduled, then sampling of tokens and predictions in one go."""
        shares = plan.scheduled
        segments = _ordered_segments(shares)
        first_rows = {(id(s.share), s.is_scaling): s.row for s in segments}
        token_rows: list[int] = []
        prediction_rows: list[int] = []
        for share in shares:
            real = first_rows.get((id(share), False), 0) - share.real_start
            scaling = first_rows.get((id(share), True), 0) - share.scaling_start
            token_rows += range(real + share.real_end - share.samples, real + share.real_end)
            first = scaling + share.predict_start - 1
            prediction_rows += range(first, first + share.predict_count)
        batch = self._batch(segments, token_rows + prediction_rows)
        step = self.compiled if self.compiled is not None and batch.is_decode else self.captured or self.model
        output = step.forward(batch, self.kv_cache)
        tokens, predictions = self._sample(output.logits, shares)
        return RunResult(tokens, predictions, [_scalings_alone(share, output, first_rows) for share in shares])

    def _sample(self, logits: Tensor, shares: list[Scheduled]) -> tuple[list[list[TokenOutput]], list[list[int]]]:
        """logits [L, V] of all tokens, then of all predictions. Returns both by share."""
        rows: list[SampleRow] = []
        for share in shares:
            rows += (SampleRow(share.sequence, share.sequence.drafts[:count]) for count in range(share.samples))
        split = len(rows)
        for share in shares:
            first = share.predict_start - len(share.sequence.tokens)
            drafts = share.sequence.drafts
            rows += (SampleRow(share.sequence, drafts[: first + i]) for i in range(share.predict_count))
        ids = sample(logits, rows) if rows else []
        tokens, predictions = iter(token_outputs(logits[:split], rows[:split], ids[:split])), iter(ids[split:])
        return (
            [list(islice(tokens, share.samples)) for share in shares],
            [list(islice(predictions, share.predict_count)) for share in shares],
        )

    def report(self, plan: Plan, result: RunResult, *, flush: bool) -> tuple[list[GateRows | None], GateStats]:
        """The gate rows that have become final, for each of the plan's `scheduled` that asked, and statistics.

        Called when the drafts have been verified and before any block is released.
        """
        rows: dict[int, GateRows | None] = {}
        spans = report_spans(share.sequence for share in plan.scheduled if share.sequence.generates)
        if spans:
            slots = [slot for s in spans for slot in self._gate_slots(s.sequence, s.start, s.count)]
            stored = self.kv_cache.gate_rows.index_select(0, self._tensor(slots))
            observed = self._observer.observe(spans, stored)
            rows = {id(span.sequence): one for span, one in zip(spans, observed, strict=True)}
        for share, scalings in zip(plan.scheduled, result.scalings, strict=True):
            if scalings is not None:
                rows[id(share.sequence)] = self._report_alone(share, scalings)
        return [rows.get(id(share.sequence)) for share in plan.scheduled], self._observer.statistics(flush=flush)

    def _report_alone(self, share: Scheduled, scalings: Tensor) -> GateRows | None:
        """The rows of a scaling pass alone, from its own scalings [scaling_count, S, E]."""
        for span in report_spans([share.sequence]):
            new = scalings[span.start - share.scaling_start :]
            return gate_rows(span, new, summarise(new), len(self.model.sites))
        return None

    def flush(self) -> GateStats:
        """Statistics that no step has reported yet."""
        return self._observer.statistics(flush=True)

    # -- the flat batch ------------------------------------------------------------------------------------------

    def _batch(self, segments: list[_Segment], logit_rows: list[int]) -> Batch:
        """Every index of the batch in one tensor, and views of it."""
        cache = self.kv_cache
        scaling = [s for s in segments if s.is_scaling]
        real = segments[len(scaling) :]
        scaling_rows = sum(s.count for s in scaling)
        row_count = scaling_rows + sum(s.count for s in real)
        grouped = _attention_groups(segments if self.compiled is None else _one_row_each(segments))
        tables = [self._block_table(group) for group in grouped]
        values = [token for s in segments for token in s.share.sequence.hypothesis(s.start, s.start + s.count)]
        values += (position for s in segments for position in range(s.start, s.start + s.count))
        values += (slot for s in segments for slot in self._slots(s.stream, s.start, s.count))
        values += [cache.dummy_slot] * scaling_rows
        values += (slot for s in real for slot in self._gate_slots(s.share.sequence, s.start, s.count))
        values += (slot for s in scaling for slot in self._new_gate_slots(s))
        values += [cache.scratch_slot] * (row_count - scaling_rows)
        sizes = [len(values), len(logit_rows), *map(len, tables)]
        packed = self._tensor([*values, *logit_rows, *(block for table in tables for block in table)])
        rows, logit_index, *views = packed.split_with_sizes(sizes)
        batch = Batch(rows.view(5, row_count), scaling_rows, logit_index, groups=[])
        batch.groups = [_group(group, batch.positions, table) for group, table in zip(grouped, views, strict=True)]
        return batch

    def _block_table(self, group: list[_Segment]) -> list[int]:
        """The block tables of a group's streams, one after another, as wide as the widest needs."""
        width = -(-max(s.start + s.count for s in group) // self.block_size)
        table: list[int] = []
        for segment in group:
            blocks = segment.stream.blocks[:width]
            table += blocks + blocks[:1] * (width - len(blocks))
        return table

    def _new_gate_slots(self, segment: _Segment) -> list[int]:
        """Where the new scalings of a segment of the scaling stream go."""
        sequence = segment.share.sequence
        if not sequence.generates:
            return [self.kv_cache.scratch_slot] * segment.count
        return self._slots(sequence.real, segment.start, segment.count)

    def _gate_slots(self, sequence: Sequence, start: int, count: int) -> list[int]:
        """Slots of the gate rows that serve positions start .. start + count."""
        end = start + count
        if end <= sequence.gate_end:
            return self._slots(sequence.real, start, count)
        frozen = max(start, sequence.gate_end)
        [slot] = self._slots(sequence.real, sequence.gate_end - 1, 1)
        return [*self._slots(sequence.real, start, frozen - start), *[slot] * (end - frozen)]

    def _slots(self, stream: Stream, start: int, count: int) -> list[int]:
        """Slots of positions start .. start + count of a stream."""
        size, blocks = self.block_size, stream.blocks
        if count == 1:
            return [blocks[start // size] * size + start % size]
        return [blocks[position // size] * size + position % size for position in range(start, start + count)]

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(values, self.model.device)


def _scalings_alone(share: Scheduled, output: ForwardOutput, first_rows: dict[tuple[int, bool], int]) -> Tensor | None:
    """The new scalings of a scaling pass alone."""
    if share.sequence.generates:
        return None
    row = first_rows[id(share), True]
    return output.new_scalings[row : row + share.scaling_count]


def _ordered_segments(shares: list[Scheduled]) -> list[_Segment]:
    """Scaling rows first, then real rows; single rows meet in the middle, where they form one attention group."""
    scaling = [s for s in shares if s.scaling_count]
    real = [s for s in shares if s.real_count]
    scaling.sort(key=lambda share: -share.scaling_count)
    real.sort(key=lambda share: share.real_count)
    segments: list[_Segment] = []
    row = 0
    for share in scaling:
        segments.append(_Segment(share, share.sequence.scaling, share.scaling_start, share.scaling_count, True, row))
        row += share.scaling_count
    for share in real:
        segments.append(_Segment(share, share.sequence.real, share.real_start, share.real_count, False, row))
        row += share.real_count
    return segments


def _one_row_each(segments: list[_Segment]) -> list[_Segment]:
    """Segments of one row each, where all are short: a compiled step wants them so. Else `segments` as they are."""
    if all(s.count == 1 for s in segments) or any(s.count > _MOST_SPLIT_ROWS for s in segments):
        return segments
    return [replace(s, start=s.start + i, count=1, row=s.row + i) for s in segments for i in range(s.count)]


def _attention_groups(segments: list[_Segment]) -> list[list[_Segment]]:
    """Neighbouring segments of equally few rows share a group; every longer one has its own (no padded queries)."""
    groups: list[list[_Segment]] = []
    for segment in segments:
        if groups and segment.count == groups[-1][0].count <= _MOST_SHARED_QUERIES:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _group(segments: list[_Segment], positions: Tensor, block_table: Tensor) -> AttentionGroup:
    """positions int64 [T] of the whole batch, block_table int64 [segments * blocks]"""
    ends = [s.start + s.count for s in segments]
    number, count, first = len(segments), segments[0].count, segments[0].row
    return AttentionGroup(
        start=first,
        segments=number,
        queries=count,
        positions=positions[first : first + number * count].view(number, count),
        block_table=block_table.view(number, -1),
        keys=max(ends),
        needs_mask=count > 1 or min(ends) != max(ends),
    )
