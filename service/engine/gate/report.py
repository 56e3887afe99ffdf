"""What a step tells the outside about its gate: rows for those who asked, statistics for the metrics.

A position is reported once, when its real row has run and was kept (or its scaling row has run, for a scaling pass
alone): only then are its scalings sure to be used. Rows found in the prefix cache, or computed again after a
preemption, are read from the cache, so what a request gets is complete and nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from service.contract.output import GateRows, GateStats
from service.engine.sequence import Sequence
from service.model.gate_stats import GateSummary, summarise

_STEPS_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class ReportSpan:
    """Positions start .. start + count of one sequence, at rows offset .. offset + count of a report."""

    sequence: Sequence
    start: int
    count: int
    offset: int


def report_spans(sequences: Iterable[Sequence]) -> list[ReportSpan]:
    """The positions that have become final and are not reported yet; empty spans are left out."""
    spans: list[ReportSpan] = []
    offset = 0
    for sequence in sequences:
        start, end = sequence.reported, sequence.final
        if end > start:
            spans.append(ReportSpan(sequence, start, end - start, offset))
            offset += end - start
    return spans


class GateObserver:
    """Summarises the gate rows of served positions, many at once: a summary costs nearly the same for one row as for
    dozens, and few look at every step.
    """

    def __init__(self, num_sites: int) -> None:
        self._num_sites = num_sites
        self._stats = GateStats()  # of what has been observed since they were last taken
        self._skipped = 0  # steps since all were read

    def due(self, sequences: list[Sequence], ended: list[Sequence]) -> list[Sequence]:
        """Those of a step's sequences that are to report what has become final of them: who has asked for rows, is at
        its first, or has ended, at once; else all, several steps in one go.
        """
        self._skipped += 1
        if self._skipped >= _STEPS_TOGETHER:
            self._skipped = 0
            return sequences
        return [
            sequence
            for sequence in sequences
            if sequence.reported < sequence.prompt_len
            or sequence.request.return_scalings != "none"
            or sequence in ended
        ]

    def observe(self, spans: SequenceOf[ReportSpan], scalings: Tensor) -> list[GateRows | None]:
        """Adds the rows [n, S, E] of `spans` (sequences that generate) to the statistics and to the usage of each.
        Returns those asked for, one per span.
        """
        summary = summarise(scalings)
        self._stats.add(gate_stats(spans, summary))
        return gate_rows(spans, scalings, summary, self._num_sites)

    def take_statistics(self) -> GateStats:
        """Statistics of what has been observed since the last call."""
        taken, self._stats = self._stats, GateStats()
        return taken


def gate_rows(
    spans: SequenceOf[ReportSpan], scalings: Tensor, summary: GateSummary, num_sites: int
) -> list[GateRows | None]:
    """The rows that each span's request asked for. scalings [n, S, E] (S may be 1: the same row at every site)."""
    asked = {span.sequence.request.return_scalings for span in spans}
    if asked == {"none"}:
        return [None] * len(spans)
    full = scalings.expand(-1, num_sites, -1).cpu().numpy() if "full" in asked else None
    found: list[GateRows | None] = []
    for span in spans:
        request = span.sequence.request
        wanted = span.sequence.prompt_len - 1 if request.scalings_start is None else request.scalings_start
        skip = max(0, wanted - span.start)
        if request.return_scalings == "none" or skip >= span.count:
            found.append(None)
            continue
        rows = slice(span.offset + skip, span.offset + span.count)
        mean, entropy = summary.mean[rows].tobytes(), summary.entropy[rows].tobytes()
        own = full[rows].tobytes() if full is not None and request.return_scalings == "full" else None
        found.append(GateRows(span.start + skip, span.count - skip, mean, entropy, own))
    return found


def gate_stats(spans: SequenceOf[ReportSpan], summary: GateSummary) -> GateStats:
    """Statistics of served positions. Adds to the usage of each sequence what its positions from the prompt's last on
    did, where any expert acted.
    """
    share, entropy = summary.share.T, summary.entropy  # [E, n], [n]
    in_prompt = np.zeros(len(entropy), np.bool_)  # before the prompt's last
    for span in spans:
        before_last = min(span.count, span.sequence.prompt_len - 1 - span.start)
        if before_last > 0:
            in_prompt[span.offset : span.offset + before_last] = True
    acts = ~np.isnan(entropy)
    of_usage = np.concatenate([acts[None], entropy[None], share])  # [2 + E, n]
    of_usage[:, in_prompt | ~acts] = 0
    sums = np.add.reduceat(of_usage, [span.offset for span in spans], axis=1, dtype=np.float64)  # [2 + E, spans]
    for span, (positions, nats, *shares) in zip(spans, sums.T.tolist(), strict=True):
        if positions:
            span.sequence.usage.add_gate(int(positions), nats, shares)
    return GateStats(
        prompt_entropy=entropy[in_prompt].tobytes(),
        generated_entropy=entropy[~in_prompt].tobytes(),
        weight=share.sum(1).tolist(),
        top1=np.bincount(share.argmax(0)[acts], minlength=len(share)).tolist(),
    )
