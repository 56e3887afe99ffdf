"""Builds the flat batch of a step: token ids, positions, KV slots and gate slots of every row, attention groups.

Knows how a plan becomes rows; what the model does with them is model/'s, which rows run is the scheduler's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter

from torch import Tensor

from service.engine.block_manager import BlockTable, table_of
from service.engine.gate import batch_gate
from service.engine.gate.batch_gate import dummy_slot
from service.engine.plan import ScheduledSequence
from service.engine.sequence import Stream
from service.engine.slots import gate_slots, stream_slots
from service.model.batch import FIELDS, AttentionGroup, Batch
from service.model.kv_cache import KVCache
from service.model.transfer import to_device

_MAX_SHARED_QUERIES = 16  # longer segments have an attention call each: their keys are not padded


@dataclass(slots=True)
class Segment:
    """`count` consecutive positions of one stream of one scheduled sequence: rows of the flat batch from `row` on."""

    scheduled: ScheduledSequence
    stream: Stream
    start: int
    count: int
    is_scaling: bool
    row: int


class BatchBuilder:
    """Builds batches over one KV cache and the gate's sites."""

    def __init__(self, cache: KVCache, sites: Sequence[str]) -> None:
        self._cache, self._sites = cache, sites
        self._device = cache.gate_rows.device
        self._block_size = cache.block_size

    def build(self, scheduled: list[ScheduledSequence]) -> Batch:
        """The batch of a plan: one tensor with every index, copied to the device at once, and views of it. Sets the row
        offsets of each ScheduledSequence.
        """
        segments = _ordered_segments(scheduled)
        logit_rows = _logit_rows(scheduled)
        scaling_rows = sum(one.scaling_count for one in scheduled)
        row_count = segments[-1].row + segments[-1].count
        grouped = _attention_groups(segments)
        tables = [self._block_table(group) for group in grouped]
        own_gates = [one for one in scheduled if one.sequence.has_own_gate]
        values = array("q", chain(*self._lines(segments, scaling_rows, row_count), logit_rows))
        for table in tables:
            values += table
        packed = to_device(values, self._device)
        rows, logit_index, *views = packed.split_with_sizes([FIELDS * row_count, len(logit_rows), *map(len, tables)])
        batch = Batch(
            rows.view(FIELDS, row_count),
            scaling_rows,
            logit_index,
            [],
            any(one.scaling_count and one.sequence.gate.dummy_row is not None for one in own_gates),
            batch_gate.given_rows(own_gates, self._cache, self._sites),
            batch_gate.parameters(own_gates, row_count, self._cache.gate_rows.shape[2], self._device),
        )
        batch.groups = [_group(group, batch.positions, table) for group, table in zip(grouped, views, strict=True)]
        return batch

    def _lines(self, segments: list[Segment], scaling_rows: int, row_count: int) -> list[list[int]]:
        """The lines of Batch.fields, a list each."""
        cache, size, scratch = self._cache, self._block_size, self._cache.scratch_slot
        ids: list[int] = []
        positions: list[int] = []
        kv_slots: list[int] = []
        read_from: list[int] = []
        write_to: list[int] = []
        for s in segments:
            sequence, position = s.scheduled.sequence, s.start
            if s.count == 1 and position < sequence.gate_end and sequence.generates:  # decode: spare it the ranges
                known, block, offset = len(sequence.tokens), position // size, position % size
                ids.append(sequence.tokens[position] if position < known else sequence.drafts[position - known])
                positions.append(position)
                slot = s.stream.blocks[block] * size + offset
                kv_slots.append(slot)
                if s.is_scaling:
                    read_from.append(dummy_slot(cache, sequence) if sequence.has_own_gate else cache.dummy_slot)
                    write_to.append(sequence.real.blocks[block] * size + offset)
                else:
                    read_from.append(slot)
                    write_to.append(scratch)
                continue
            ids += sequence.token_ids(s.start, s.start + s.count)
            positions += range(s.start, s.start + s.count)
            kv_slots += stream_slots(s.stream, s.start, s.count, size)
            if not s.is_scaling:
                read_from += gate_slots(sequence, s.start, s.count, size)
                write_to += [scratch] * s.count
                continue
            read_from += [dummy_slot(cache, sequence)] * s.count
            if sequence.generates:
                write_to += stream_slots(sequence.real, s.start, s.count, size)
            else:
                write_to += [scratch] * s.count
        is_scaling = [1] * scaling_rows + [0] * (row_count - scaling_rows)
        return [ids, positions, kv_slots, read_from, write_to, is_scaling]

    def _block_table(self, group: list[Segment]) -> BlockTable:
        """The block tables of a group's streams, one after another, padded to the longest."""
        width = -(-max(s.start + s.count for s in group) // self._block_size)
        table = table_of()
        for segment in group:
            blocks = segment.stream.blocks
            if len(blocks) == width:
                table += blocks
            else:
                table += blocks[:width]
                table += blocks[:1] * (width - len(blocks))
        return table


def _ordered_segments(scheduled: list[ScheduledSequence]) -> list[Segment]:
    """Scaling segments, longest first, then real segments, shortest first: single rows of both kinds are neighbours and
    form one attention group. Sets `scaling_row` and `real_row`.
    """
    segments: list[Segment] = []
    row = 0
    for one in sorted((s for s in scheduled if s.scaling_count), key=lambda s: -s.scaling_count):
        one.scaling_row = row
        segments.append(Segment(one, one.sequence.scaling, one.scaling_start, one.scaling_count, True, row))
        row += one.scaling_count
    for one in sorted((s for s in scheduled if s.real_count), key=lambda s: s.real_count):
        one.real_row = row
        segments.append(Segment(one, one.sequence.real, one.real_start, one.real_count, False, row))
        row += one.real_count
    return segments


def _logit_rows(scheduled: list[ScheduledSequence]) -> list[int]:
    """The rows of the flat batch whose logits are needed, sequence by sequence. Sets `logit_row`."""
    rows: list[int] = []
    for one in scheduled:
        one.logit_row = len(rows)
        end = one.real_row + one.real_count
        rows += range(end - one.samples, end)
        if one.predict_count:
            first = one.scaling_row + one.predict_start - 1 - one.scaling_start
            rows += range(first, first + one.predict_count)
        if one.scores:
            first = one.real_row - one.real_start
            rows += range(first + one.scores.start, first + one.scores.stop)
    return rows


def _attention_groups(segments: list[Segment]) -> list[list[Segment]]:
    """Groups neighbouring short segments of equal length; longer ones get a group each, so no query is padded."""
    groups: list[list[Segment]] = []
    for count, neighbours in groupby(segments, attrgetter("count")):
        if count <= _MAX_SHARED_QUERIES:
            groups.append(list(neighbours))
        else:
            groups += [[segment] for segment in neighbours]
    return groups


def _group(segments: list[Segment], positions: Tensor, block_table: Tensor) -> AttentionGroup:
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
