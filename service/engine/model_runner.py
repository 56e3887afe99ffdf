"""A plan in, tokens and gate rows out: builds the flat batch, runs the model once, samples. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.request import GateRows, GateStats, TokenOutput
from service.engine.sampler import SampleRow, sample, token_outputs
from service.engine.scheduler import Plan, Scheduled
from service.engine.sequence import Stream
from service.model.batch import AttentionGroup, Batch
from service.model.gate_stats import GateSummary, summarise
from service.model.kv_cache import KVCache
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
        self.block_size = kv_cache.layout.block_size

    def run(self, plan: Plan) -> RunResult:
        """One forward over everything scheduled, then sampling of drafts and tokens in one go."""
        shares = plan.scheduled
        segments = _ordered_segments(shares)
        offsets = _row_offsets(segments)
        draft_shares = [share for share in shares if share.predicts]
        token_shares = [share for share in shares if share.samples]
        last_rows = {(id(s.share), s.is_scaling): offset + s.count - 1 for s, offset in zip(segments, offsets, strict=True)}
        logit_rows = [last_rows[id(share), True] for share in draft_shares]
        logit_rows += [last_rows[id(share), False] for share in token_shares]
        output = self.model.forward(self._batch(segments, offsets, logit_rows), self.kv_cache)
        tokens, drafts = self._sample(output, draft_shares, token_shares)
        gate, stats = self._report(shares, output, {id(s.share): o for s, o in zip(segments, offsets, strict=True) if s.is_scaling})
        return RunResult(
            tokens=[tokens.get(id(share)) for share in shares],
            drafts=[drafts.get(id(share)) for share in shares],
            gate=gate,
            gate_stats=stats,
        )

    # -- the flat batch ------------------------------------------------------------------------------------------

    def _batch(self, segments: list[_Segment], offsets: list[int], logit_rows: list[int]) -> Batch:
        positions = [position for s in segments for position in range(s.start, s.start + s.count)]
        scaling = [s for s in segments if s.is_scaling]
        stored = [(offset, s) for s, offset in zip(segments, offsets, strict=True) if s.is_scaling and s.share.sequence.generates]
        return Batch(
            input_ids=self._tensor([token for s in segments for token in _tokens(s)]),
            positions=self._tensor(positions),
            kv_slots=self._tensor([slot for s in segments for slot in self._slots(s.stream, s.start, s.count)]),
            num_scaling_rows=sum(s.count for s in scaling),
            real_gate_slots=self._tensor(
                [slot for s in segments if not s.is_scaling for slot in self._slots(s.stream, s.start, s.count)]
            ),
            new_gate_rows=self._tensor([row for offset, s in stored for row in range(offset, offset + s.count)]),
            new_gate_slots=self._tensor(
                [slot for _, s in stored for slot in self._slots(s.share.sequence.real, s.start, s.count)]
            ),
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

    def _slots(self, stream: Stream, start: int, count: int) -> Iterable[int]:
        """Slots of positions start .. start + count of a stream."""
        size, blocks = self.block_size, stream.blocks
        if count == 1:
            return (blocks[start // size] * size + start % size,)
        return [blocks[position // size] * size + position % size for position in range(start, start + count)]

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)

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
    ) -> tuple[list[GateRows | None], GateStats]:
        """Gate rows of every position whose real row has now run (or scaling row, for a scaling pass alone), each once."""
        pieces: list[Tensor] = []
        spans: list[tuple[int, int] | None] = []  # (first position, count)
        stored_slots: list[int] = []
        generating = [share for share in shares if share.sequence.generates]
        for share in generating:
            start, end = share.sequence.reported, share.real_start + share.real_count
            stored_slots += self._slots(share.sequence.real, start, end - start) if end > start else []
        if stored_slots:
            pieces.append(self.kv_cache.gate_rows.index_select(0, self._tensor(stored_slots)))
        for share in shares:
            if not share.sequence.generates:
                offset = scaling_offsets[id(share)]
                pieces.append(output.new_scalings[offset : offset + share.scaling_count])
        if not pieces:
            return [None] * len(shares), GateStats()
        scalings = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        summary = summarise(scalings)
        spans = [_report_span(share) for share in shares]
        order = [*generating, *(share for share in shares if not share.sequence.generates)]
        offsets = _span_offsets(order)
        gate = [
            self._gate_rows(share, span, offsets[id(share)], scalings, summary) if span else None
            for share, span in zip(shares, spans, strict=True)
        ]
        return gate, self._gate_stats(generating, offsets, summary)

    def _gate_rows(
        self, share: Scheduled, span: tuple[int, int], offset: int, scalings: Tensor, summary: GateSummary
    ) -> GateRows | None:
        """The rows the request asked for, of its positions start .. start + count at `offset` in the step's rows."""
        request = share.sequence.request
        if request.return_scalings == "none":
            return None
        wanted = request.scalings_start if request.scalings_start is not None else share.sequence.prompt_len - 1
        start, count = span
        skip = max(0, wanted - start)
        if skip >= count:
            return None
        rows = slice(offset + skip, offset + count)
        full = None
        if request.return_scalings == "full":
            sites = len(self.model.sites)
            full = scalings[rows].expand(-1, sites, -1).cpu().contiguous().numpy().tobytes()
        return GateRows(
            start=start + skip,
            count=count - skip,
            mean=summary.mean[rows].contiguous().numpy().tobytes(),
            entropy=summary.entropy[rows].contiguous().numpy().tobytes(),
            full=full,
        )

    def _gate_stats(self, generating: list[Scheduled], offsets: dict[int, int], summary: GateSummary) -> GateStats:
        """Each served position once; the last prompt position counts as generated. Scaling passes alone are not served."""
        prompt: list[int] = []
        generated: list[int] = []
        for share in generating:
            span = _report_span(share)
            for position in range(span[0], span[0] + span[1]) if span else ():
                row = offsets[id(share)] + position - share.sequence.reported
                (prompt if position < share.sequence.prompt_len - 1 else generated).append(row)
        rows = len(prompt) + len(generated)
        if not rows:
            return GateStats()
        shares = summary.share[:rows]
        return GateStats(
            prompt_entropy=summary.entropy[prompt].numpy().tobytes(),
            generated_entropy=summary.entropy[generated].numpy().tobytes(),
            weight=shares.sum(0).tolist(),
            top1=torch.bincount(shares[shares.any(-1)].argmax(-1), minlength=shares.shape[1]).tolist(),
        )


def _ordered_segments(shares: list[Scheduled]) -> list[_Segment]:
    """Scaling rows first, then real rows; inside, single rows meet in the middle so that they form one attention group."""
    scaling = [_Segment(s, s.sequence.scaling, s.scaling_start, s.scaling_count, True) for s in shares if s.scaling_count]
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


def _report_span(share: Scheduled) -> tuple[int, int] | None:
    """(first position, count) of the gate rows that become final with this step."""
    start = share.sequence.reported
    end = share.real_start + share.real_count if share.sequence.generates else share.scaling_start + share.scaling_count
    return (start, end - start) if end > start else None


def _span_offsets(order: list[Scheduled]) -> dict[int, int]:
    """Where each share's span begins among the step's reported rows."""
    offsets, row = {}, 0
    for share in order:
        offsets[id(share)] = row
        span = _report_span(share)
        row += span[1] if span else 0
    return offsets
