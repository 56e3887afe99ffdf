"""The rows of a step, one after another: positions of streams, and where what belongs to them lies."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from service.engine.block_manager import BlockTable, table_of
from service.engine.gate import admitted_gate
from service.engine.scheduler import Scheduled
from service.engine.sequence import Sequence, Stream
from service.model.batch import LINES, AttentionGroup, Batch
from service.model.kv_cache import KVCache
from service.model.transfer import to_device

_MOST_SHARED_QUERIES = 16  # longer segments have an attention call each: their keys are not padded


@dataclass(slots=True)
class Segment:
    """`count` consecutive positions of one stream of one scheduled sequence: rows of the flat batch from `row` on."""

    share: Scheduled
    stream: Stream
    start: int
    count: int
    is_scaling: bool
    row: int = 0


class BatchBuilder:
    """Knows the KV cache that the rows read and write."""

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        self._cache, self._device = cache, device
        self._block_size = cache.block_size

    def build(self, segments: list[Segment], logit_rows: list[int]) -> Batch:
        """Every index of the batch in one tensor, and views of it."""
        cache = self._cache
        scaling_rows = sum(s.count for s in segments if s.is_scaling)
        row_count = segments[-1].row + segments[-1].count
        grouped = _attention_groups(segments)
        tables = [self._block_table(group) for group in grouped]
        ids: list[int] = []
        positions: list[int] = []
        kv_slots: list[int] = []
        gate_slots: list[int] = []
        new_gate_slots: list[int] = []
        is_scaling = [1] * scaling_rows + [0] * (row_count - scaling_rows)
        for s in segments:
            ids += s.share.sequence.hypothesis(s.start, s.start + s.count)
            positions += range(s.start, s.start + s.count)
            kv_slots += self.slots(s.stream, s.start, s.count)
            if s.is_scaling:
                gate_slots += [admitted_gate.dummy_slot(cache, s.share.sequence)] * s.count
                new_gate_slots += self.new_gate_slots(s)
            else:
                gate_slots += self.gate_slots(s.share.sequence, s.start, s.count)
                new_gate_slots += [cache.scratch_slot] * s.count
        lines = [ids, positions, kv_slots, gate_slots, new_gate_slots, is_scaling]
        values = array("q", chain(*lines, logit_rows))
        for table in tables:
            values += table
        sizes = [LINES * row_count, len(logit_rows), *map(len, tables)]
        packed = to_device(values, self._device)
        rows, logit_index, *views = packed.split_with_sizes(sizes)
        gated = any(s.is_scaling and s.share.sequence.gate.dummy_row is not None for s in segments)
        batch = Batch(rows.view(LINES, row_count), scaling_rows, logit_index, [], scaling_rows_are_gated=gated)
        batch.groups = [_group(group, batch.positions, table) for group, table in zip(grouped, views, strict=True)]
        return batch

    def new_gate_slots(self, segment: Segment) -> list[int]:
        """Where the new scalings of a segment of the scaling stream go."""
        sequence = segment.share.sequence
        if not sequence.generates:
            return [self._cache.scratch_slot] * segment.count
        return self.slots(sequence.real, segment.start, segment.count)

    def gate_slots(self, sequence: Sequence, start: int, count: int) -> list[int]:
        """Slots of the gate rows that serve positions start .. start + count."""
        end = start + count
        if end <= sequence.gate_end:
            return self.slots(sequence.real, start, count)
        frozen = max(start, sequence.gate_end)
        [slot] = self.slots(sequence.real, max(0, sequence.gate_end - 1), 1)
        return [*self.slots(sequence.real, start, frozen - start), *[slot] * (end - frozen)]

    def slots(self, stream: Stream, start: int, count: int) -> list[int]:
        """Slots of positions start .. start + count of a stream."""
        size, blocks = self._block_size, stream.blocks
        if count == 1:
            return [blocks[start // size] * size + start % size]
        return [blocks[position // size] * size + position % size for position in range(start, start + count)]

    def _block_table(self, group: list[Segment]) -> BlockTable:
        """The block tables of a group's streams, one after another, as wide as the widest needs."""
        width = -(-max(s.start + s.count for s in group) // self._block_size)
        table = table_of()
        for segment in group:
            blocks = segment.stream.blocks[:width]
            table += blocks + blocks[:1] * (width - len(blocks))
        return table


def ordered_segments(shares: list[Scheduled]) -> list[Segment]:
    """Scaling rows first, then real rows; single rows meet in the middle, where they form one attention group."""
    scaling = [s for s in shares if s.scaling_count]
    real = [s for s in shares if s.real_count]
    scaling.sort(key=lambda share: -share.scaling_count)
    real.sort(key=lambda share: share.real_count)
    segments: list[Segment] = []
    row = 0
    for share in scaling:
        segments.append(Segment(share, share.sequence.scaling, share.scaling_start, share.scaling_count, True, row))
        row += share.scaling_count
    for share in real:
        segments.append(Segment(share, share.sequence.real, share.real_start, share.real_count, False, row))
        row += share.real_count
    return segments


def _attention_groups(segments: list[Segment]) -> list[list[Segment]]:
    """Neighbouring segments of equally few rows share a group; every longer one has its own (no padded queries)."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and segment.count == groups[-1][0].count <= _MOST_SHARED_QUERIES:
            groups[-1].append(segment)
        else:
            groups.append([segment])
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
