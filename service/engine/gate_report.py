"""What a step tells the outside about its gate: rows for those who asked, statistics for the metrics.

A position is reported once, in the step in which its real row runs (or its scaling row, for a scaling pass alone): only
then are its scalings sure to be used. Rows shared with another choice, or computed again after a preemption, are read
from the cache, so what a request gets is complete and nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.request import GateRows, GateStats
from service.engine.scheduler import Scheduled
from service.model.gate_stats import GateSummary


@dataclass(frozen=True, slots=True)
class ReportSpan:
    """Positions start .. start + count of one sequence, at rows offset .. offset + count of the step's report."""

    share: Scheduled
    start: int
    count: int
    offset: int


def report_spans(shares: SequenceOf[Scheduled]) -> list[ReportSpan]:
    """The positions that become final with this step, sequences that generate first."""
    spans: list[ReportSpan] = []
    offset = 0
    for share in sorted(shares, key=lambda share: not share.sequence.generates):
        start = share.sequence.reported
        real_end, scaling_end = share.real_start + share.real_count, share.scaling_start + share.scaling_count
        end = real_end if share.sequence.generates else scaling_end
        if end > start:
            spans.append(ReportSpan(share, start, end - start, offset))
            offset += end - start
    return spans


def gate_rows(span: ReportSpan, scalings: Tensor, summary: GateSummary, num_sites: int) -> GateRows | None:
    """The rows of `span` its request asked for. scalings [n, S, E] (S may be 1: the same row at every site)."""
    request = span.share.sequence.request
    if request.return_scalings == "none":
        return None
    wanted = request.scalings_start
    skip = max(0, (span.share.sequence.prompt_len - 1 if wanted is None else wanted) - span.start)
    if skip >= span.count:
        return None
    rows = slice(span.offset + skip, span.offset + span.count)
    full = scalings[rows].expand(-1, num_sites, -1) if request.return_scalings == "full" else None
    return GateRows(
        start=span.start + skip,
        count=span.count - skip,
        mean=_bytes(summary.mean[rows]),
        entropy=_bytes(summary.entropy[rows]),
        full=None if full is None else _bytes(full),
    )


def gate_stats(spans: SequenceOf[ReportSpan], summary: GateSummary) -> GateStats:
    """Statistics of the served positions (not of scaling passes alone). The last of the prompt counts as generated."""
    served = [span for span in spans if span.share.sequence.generates]
    if not served:
        return GateStats()
    rows = sum(span.count for span in served)
    in_prompt = torch.zeros(rows, dtype=torch.bool)
    for span in served:
        before_last = span.share.sequence.prompt_len - 1 - span.start
        in_prompt[span.offset : span.offset + min(span.count, max(0, before_last))] = True
    share, entropy = summary.share[:rows], summary.entropy[:rows]
    leaders = share[share.any(-1)].argmax(-1)  # positions where no expert acts have no leader
    return GateStats(
        prompt_entropy=_bytes(entropy[in_prompt]),
        generated_entropy=_bytes(entropy[~in_prompt]),
        weight=share.sum(0).tolist(),
        top1=torch.bincount(leaders, minlength=share.shape[1]).tolist(),
    )


def _bytes(values: Tensor) -> bytes:
    return values.cpu().contiguous().numpy().tobytes()
