"""A plan in, tokens and gate rows out: builds the flat batch, runs the model once, samples. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.gate_report import gate_rows, gate_stats, report_spans
from service.engine.request import GateRows, GateStats, TokenOutput
from service.engine.sampler import SampleRow, sample, token_outputs
from service.engine.scheduler import Plan, Scheduled
from service.engine.sequence import Stream
from service.model.batch import AttentionGroup, Batch
from service.model.compiled import CompiledStep
from service.model.cuda_graph import CapturedSteps
from service.model.gate_stats import summarise
from service.model.kv_cache import KVCache
from service.model.transfer import to_device
from service.model.xlora_model import ForwardOutput, XLoraModel


@dataclass(slots=True)
class RunResult:
    """What one step brought, aligned with the plan's `scheduled`; None where a sequence had none."""

    tokens: list[TokenOutput | None]
    drafts: list[int | None]
    gate: list[GateRows | None]
    gate_stats: GateStats


@dataclass(frozen=True, slots=True)
class _Segment:
    """`count` consecutive positions of one stream of one scheduled sequence: rows of the flat batch."""

    share: Scheduled
    stream: Stream
    start: int
    count: int
    is_scaling: bool


class ModelRunner:
    """Owns the model and the KV cache, on one device."""

    def __init__(self, model: XLoraModel, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.block_size = kv_cache.block_size
        self.compiled: CompiledStep | None = None  # on a CPU, once it is there
        self.captured: CapturedSteps | None = None  # on CUDA

    def run(self, plan: Plan) -> RunResult:
        """One forward over everything scheduled, then sampling of drafts and tokens in one go."""
        shares = plan.scheduled
        segments = _ordered_segments(shares)
        offsets = _row_offsets(segments)
        draft_shares = [share for share in shares if share.predicts]
        token_shares = [share for share in shares if share.samples]
        last_rows = {
            (id(s.share), s.is_scaling): offset + s.count - 1 for s, offset in zip(segments, offsets, strict=True)
        }
        logit_rows = [last_rows[id(share), True] for share in draft_shares]
        logit_rows += [last_rows[id(share), False] for share in token_shares]
        batch = self._batch(segments, offsets, logit_rows)
        step = self.compiled if self.compiled is not None and batch.is_decode else self.captured or self.model
        output = step.forward(batch, self.kv_cache)
        tokens, drafts = self._sample(output, draft_shares, token_shares)
        scaling_offsets = {id(s.share): offset for s, offset in zip(segments, offsets, strict=True) if s.is_scaling}
        gate, stats = self._report(shares, output, scaling_offsets)
        return RunResult(
            tokens=[tokens.get(id(share)) for share in shares],
            drafts=[drafts.get(id(share)) for share in shares],
            gate=[gate.get(id(share)) for share in shares],
            gate_stats=stats,
        )

    # -- the flat batch ------------------------------------------------------------------------------------------

    def _batch(self, segments: list[_Segment], offsets: list[int], logit_rows: list[int]) -> Batch:
        cache = self.kv_cache
        tokens: list[int] = []
        positions: list[int] = []
        kv_slots: list[int] = []
        gate_slots: list[int] = []
        new_gate_slots: list[int] = []
        for s in segments:
            own = self._slots(s.stream, s.start, s.count)
            tokens += _tokens(s)
            positions += range(s.start, s.start + s.count)
            kv_slots += own
            if not s.is_scaling:
                gate_slots += own
                new_gate_slots += [cache.scratch_slot] * s.count
            else:
                gate_slots += [cache.dummy_slot] * s.count
                sequence = s.share.sequence
                kept = self._slots(sequence.real, s.start, s.count) if sequence.generates else None
                new_gate_slots += kept or [cache.scratch_slot] * s.count
        return Batch(
            rows=self._tensor([tokens, positions, kv_slots, gate_slots, new_gate_slots]),
            num_scaling_rows=sum(s.count for s in segments if s.is_scaling),
            logit_rows=self._tensor(logit_rows),
            groups=self._groups(segments, offsets),
        )

    def _groups(self, segments: list[_Segment], offsets: list[int]) -> list[AttentionGroup]:
        """Neighbouring segments of one row each share a group; every longer one has its own (no padded queries)."""
        groups: list[AttentionGroup] = []
        first = 0
        while first < len(segments):
            last = first + 1
            if segments[first].count == 1:
                while last < len(segments) and segments[last].count == 1:
                    last += 1
            groups.append(self._group(segments[first:last], offsets[first]))
            first = last
        return groups

    def _group(self, segments: list[_Segment], start: int) -> AttentionGroup:
        lengths = [s.start + s.count for s in segments]
        keys = max(lengths)
        width = -(-keys // self.block_size)
        table = [s.stream.blocks[:width] for s in segments]
        count = segments[0].count
        return AttentionGroup(
            start=start,
            segments=len(segments),
            queries=count,
            positions=self._tensor([list(range(s.start, s.start + s.count)) for s in segments]),
            block_table=self._tensor([blocks + [blocks[0]] * (width - len(blocks)) for blocks in table]),
            keys=keys,
            needs_mask=count > 1 or min(lengths) != keys,
        )

    def _slots(self, stream: Stream, start: int, count: int) -> list[int]:
        """Slots of positions start .. start + count of a stream."""
        size, blocks = self.block_size, stream.blocks
        if count == 1:
            return [blocks[start // size] * size + start % size]
        return [blocks[position // size] * size + position % size for position in range(start, start + count)]

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return to_device(values, self.model.device)

    # -- sampling ------------------------------------------------------------------------------------------------

    def _sample(
        self, output: ForwardOutput, draft_shares: list[Scheduled], token_shares: list[Scheduled]
    ) -> tuple[dict[int, TokenOutput], dict[int, int]]:
        """Returns tokens and drafts by id of their share."""
        rows = [SampleRow(share.sequence, share.sequence.draft if share.drafted else None) for share in draft_shares]
        rows += [SampleRow(share.sequence) for share in token_shares]
        if not rows:
            return {}, {}
        ids = sample(output.logits, rows)
        split = len(draft_shares)
        drafts = {id(share): token for share, token in zip(draft_shares, ids[:split], strict=True)}
        outputs = token_outputs(output.logits[split:], rows[split:], ids[split:])
        return {id(share): token for share, token in zip(token_shares, outputs, strict=True)}, drafts

    # -- gate rows -----------------------------------------------------------------------------------------------

    def _report(
        self, shares: list[Scheduled], output: ForwardOutput, scaling_offsets: dict[int, int]
    ) -> tuple[dict[int, GateRows], GateStats]:
        """Returns the gate rows asked for, by id of their share, and the step's statistics."""
        spans = report_spans(shares)
        if not spans:
            return {}, GateStats()
        stored: list[int] = []
        pieces: list[Tensor] = []
        for span in spans:
            if span.share.sequence.generates:
                stored += self._slots(span.share.sequence.real, span.start, span.count)
            else:
                offset = scaling_offsets[id(span.share)]
                pieces.append(output.new_scalings[offset : offset + span.count])
        if stored:
            pieces.insert(0, self.kv_cache.gate_rows.index_select(0, self._tensor(stored)))
        scalings = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        summary = summarise(scalings)
        num_sites = len(self.model.sites)
        rows = {id(span.share): gate_rows(span, scalings, summary, num_sites) for span in spans}
        return {share: asked for share, asked in rows.items() if asked is not None}, gate_stats(spans, summary)


def _ordered_segments(shares: list[Scheduled]) -> list[_Segment]:
    """Scaling rows first, then real rows; single rows meet in the middle, where they form one attention group."""
    advancing = [share for share in shares if share.scaling_count]
    scaling = [_Segment(s, s.sequence.scaling, s.scaling_start, s.scaling_count, True) for s in advancing]
    real = [_Segment(s, s.sequence.real, s.real_start, s.real_count, False) for s in shares if s.real_count]
    scaling.sort(key=lambda segment: segment.count == 1)
    real.sort(key=lambda segment: segment.count != 1)
    return scaling + real


def _row_offsets(segments: list[_Segment]) -> list[int]:
    offsets, row = [], 0
    for segment in segments:
        offsets.append(row)
        row += segment.count
    return offsets


def _tokens(segment: _Segment) -> list[int]:
    """Token ids of the segment's positions; a drafted position holds the sequence's draft."""
    sequence = segment.share.sequence
    tokens = sequence.tokens[segment.start : segment.start + segment.count]
    if segment.is_scaling and segment.share.drafted:
        assert sequence.draft is not None
        tokens = [*tokens, sequence.draft]
    return tokens
