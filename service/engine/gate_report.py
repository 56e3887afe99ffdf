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
import torch
from torch import Tensor

from service.engine.request import GateRows, GateStats
from service.engine.sequence import Sequence
from service.model.gate_stats import GateSummary, summarise

_ENOUGH_POSITIONS = 256
_STEPS_TOGETHER = 8


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
    """Collects the gate rows of served positions and summarises many at once: a summary costs the same for one row as
    for dozens, and few look at every step.
    """

    def __init__(self, num_sites: int) -> None:
        self._num_sites = num_sites
        self._scalings: list[Tensor] = []  # each [n, S, E]
        self._in_prompt: list[bool] = []  # one per position: before the prompt's last
        self._owners: list[Sequence] = []  # one per position
        self._has_first = False  # a prompt's last position is among them
        self._skipped = 0  # steps in a row

    def due(self, sequences: Iterable[Sequence]) -> bool:
        """Whether a step is to report what has become final of its sequences: where one has asked for its rows, or is
        at its first, at once; else several steps are read in one go.
        """
        self._skipped += 1
        return self._skipped >= _STEPS_TOGETHER or any(
            sequence.request.return_scalings != "none" or sequence.reported < sequence.prompt_len
            for sequence in sequences
        )

    def observe(self, spans: SequenceOf[ReportSpan], scalings: Tensor) -> list[GateRows | None]:
        """Takes in the rows [n, S, E] of `spans` (sequences that generate). Returns those asked for, one per span."""
        self._skipped = 0
        self._scalings.append(scalings)
        for span in spans:
            before_last = min(span.count, max(0, span.sequence.prompt_len - 1 - span.start))
            self._in_prompt += [True] * before_last + [False] * (span.count - before_last)
            self._owners += [span.sequence] * span.count
            self._has_first |= span.start < span.sequence.prompt_len <= span.start + span.count
        if all(span.sequence.request.return_scalings == "none" for span in spans):
            return [None] * len(spans)
        return gate_rows(spans, scalings, self._num_sites)

    def statistics(self, *, flush: bool) -> GateStats:
        """Statistics of what has been collected, once there is enough of it, or at once with `flush` or when there is
        the first that a sequence has to say.
        """
        due = flush or self._has_first or len(self._in_prompt) >= _ENOUGH_POSITIONS
        if not self._in_prompt or not due:
            return GateStats()
        summary = summarise(torch.cat(self._scalings))
        stats = gate_stats(summary, self._in_prompt)
        _credit(summary, self._in_prompt, self._owners)
        self._scalings, self._in_prompt, self._owners, self._has_first = [], [], [], False
        return stats


def _credit(summary: GateSummary, in_prompt: SequenceOf[bool], owners: SequenceOf[Sequence]) -> None:
    """Adds to each sequence's usage what its positions from the prompt's last on did, where any expert acted."""
    share, entropy = summary.share.numpy(), summary.entropy.numpy()
    rows: dict[int, list[int]] = {}
    for row in np.flatnonzero(~np.isnan(entropy) & ~np.array(in_prompt)).tolist():
        rows.setdefault(id(owners[row]), []).append(row)
    for own in rows.values():
        usage = owners[own[0]].usage
        usage.gate_positions += len(own)
        usage.gate_entropy_sum += float(entropy[own].sum(dtype=np.float64))
        shares = share[own].sum(axis=0, dtype=np.float64)
        usage.gate_share_sum = (shares + usage.gate_share_sum if usage.gate_share_sum else shares).tolist()


def gate_rows(spans: SequenceOf[ReportSpan], scalings: Tensor, num_sites: int) -> list[GateRows | None]:
    """The rows that each span's request asked for. scalings [n, S, E] (S may be 1: the same row at every site)."""
    summary = summarise(scalings)
    mean, entropy = summary.mean.numpy(), summary.entropy.numpy()  # slices of arrays cost a tenth of tensors'
    some_full = any(span.sequence.request.return_scalings == "full" for span in spans)
    full = scalings.expand(-1, num_sites, -1).cpu().numpy() if some_full else None
    found: list[GateRows | None] = []
    for span in spans:
        request = span.sequence.request
        wanted = span.sequence.prompt_len - 1 if request.scalings_start is None else request.scalings_start
        skip = max(0, wanted - span.start)
        if request.return_scalings == "none" or skip >= span.count:
            found.append(None)
            continue
        rows = slice(span.offset + skip, span.offset + span.count)
        own = full[rows].tobytes() if full is not None and request.return_scalings == "full" else None
        found.append(GateRows(span.start + skip, span.count - skip, mean[rows].tobytes(), entropy[rows].tobytes(), own))
    return found


def gate_stats(summary: GateSummary, in_prompt: SequenceOf[bool]) -> GateStats:
    """Statistics of served positions. `in_prompt` says of each whether it lies before its prompt's last."""
    share, entropy, prompt = summary.share.numpy(), summary.entropy.numpy(), np.array(in_prompt)
    leaders = share[share.any(axis=1)].argmax(axis=1)  # positions where no expert acts have no leader
    return GateStats(
        prompt_entropy=entropy[prompt].tobytes(),
        generated_entropy=entropy[~prompt].tobytes(),
        weight=share.sum(axis=0).tolist(),
        top1=np.bincount(leaders, minlength=share.shape[1]).tolist(),
    )
