"""Reads gate rows back from the device: rows for requests that return scalings, statistics for the metrics.

A position is reported once, when it is final: its real row has run and was kept (or, for a scaling pass alone, its
scaling row has run). Rows are read from the stored gate rows, so positions found in the prefix cache are reported as
well, and positions computed again after a preemption are not counted twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from service.contract.output import GateRows, GateStats, StepStats
from service.engine import out_of_memory
from service.engine.gate import scalings_log
from service.engine.launched_step import LaunchedStep, SequenceResult
from service.engine.plan import ScheduledSequence
from service.engine.sequence import Sequence
from service.engine.slots import gate_slots
from service.model.classifier import Classifier
from service.model.gate_stats import GateSummary, PendingSummary
from service.model.kv_cache import KVCache
from service.model.transfer import HostCopies, to_device

logger = logging.getLogger(__name__)

_STEPS_PER_READ = 64  # of sequences whose rows nobody has asked for


@dataclass(slots=True)
class ReportSpan:
    """Positions start .. start + count of one sequence, at rows offset .. offset + count of a reading."""

    sequence: Sequence
    start: int
    count: int
    offset: int


class GateReading:
    """Gate rows of some spans, while they are copied from the device and once they are there."""

    def __init__(self, spans: list[ReportSpan], scalings: Tensor, num_sites: int, copies: HostCopies) -> None:
        """scalings [n, S, E] of all spans in their order (S may be 1: the same row at every site). On a CPU they are
        not copied, so they must not be written any more.
        """
        self.spans = spans
        self._rows = len(scalings)
        self._num_sites = num_sites
        self._copies = copies
        self._summary = PendingSummary(scalings, copies)
        asks = any(span.sequence.request.return_scalings == "full" for span in spans)
        self._full = copies.of(scalings) if asks else None

    def keep_final(self) -> None:
        """Cuts the spans to final positions, and leaves out sequences that were dropped since. Called after drafts have
        been verified.
        """
        for span in self.spans:
            sequence = span.sequence
            span.count = 0 if sequence.dropped else max(0, min(span.count, sequence.final - span.start))
            if span.count:
                sequence.reported = span.start + span.count
        self.spans = [span for span in self.spans if span.count]

    def read(self) -> tuple[GateStats, dict[int, GateRows | None]]:
        """Statistics of served sequences, which are added to their usage as well, and the requested rows by the
        sequence's id().
        """
        self._copies.wait()
        spans, summary, full = self.spans, self._summary.read(), self._full
        if sum(span.count for span in spans) < self._rows:
            kept = np.concatenate([np.arange(span.offset, span.offset + span.count) for span in spans])
            summary = GateSummary(summary.mean[kept], summary.share[kept], summary.entropy[kept])
            full = None if full is None else full[torch.from_numpy(kept)]
            for span, end in zip(spans, accumulate(span.count for span in spans), strict=True):
                span.offset = end - span.count
        stats = gate_stats(spans, summary) if spans[0].sequence.is_served else GateStats()
        observed = requested_rows(spans, full, summary, self._num_sites)
        return stats, {id(span.sequence): rows for span, rows in zip(spans, observed, strict=True)}


def report_spans(ends: Iterable[tuple[Sequence, int]]) -> list[ReportSpan]:
    """The unreported positions of each sequence up to an end; empty spans are left out."""
    spans: list[ReportSpan] = []
    offset = 0
    for sequence, end in ends:
        start = sequence.reported
        if end > start:
            spans.append(ReportSpan(sequence, start, end - start, offset))
            offset += end - start
    return spans


class GateReporter:
    """Reports gate rows of final positions to requests and metrics, and gate logits to the scalings log.

    launch      queues copies, behind a launched step, of all rows that may become final in it
    keep_final  once drafts are verified, before any block is released: cuts the readings to final positions
    report      while the next step runs: returns the rows and statistics
    """

    def __init__(self, kv_cache: KVCache, classifier: Classifier, num_sites: int) -> None:
        self.logs_scalings = False
        self._kv_cache, self._num_sites = kv_cache, num_sites
        self._dropped: list[GateReading] = []  # of sequences that ended between two steps
        self._skipped = 0  # steps since all sequences were read
        self._log = scalings_log.LogBuffer(classifier)

    def launch(self, launched: LaunchedStep) -> list[GateReading]:
        """Queues reads of the rows that may become final in a step that was just launched. Raises OutOfMemory."""
        with out_of_memory.recognised():
            return self._launch(launched)

    def _launch(self, launched: LaunchedStep) -> list[GateReading]:
        served = [one for one in launched.scheduled if one.sequence.is_served]
        copies = launched.copies
        readings = self._read(report_spans((one.sequence, one.real_end) for one in self.due(served)), copies)
        for one in launched.scheduled:
            if not one.sequence.generates:
                first = one.scaling_row + one.sequence.reported - one.scaling_start
                own = launched.scalings[first : one.scaling_row + one.scaling_count]
                spans = report_spans([(one.sequence, one.scaling_end)])
                readings += [GateReading(spans, own, self._num_sites, copies)] if spans else []
        return readings

    def due(self, scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """The sequences whose rows are read with this step: those that return scalings, are in their prompt, or may end
        with it. Every _STEPS_PER_READ steps it is all of them: many rows are summarised at hardly more cost than one.
        """
        self._skipped += 1
        if self._skipped >= _STEPS_PER_READ:
            self._skipped = 0
            return scheduled
        return [
            one
            for one in scheduled
            if one.sequence.reported < one.sequence.prompt_len
            or one.sequence.request.return_scalings != "none"
            or one.sequence.output_len + one.samples >= one.sequence.sampling.max_tokens
        ]

    def keep_final(self, readings: list[GateReading], ended: SequenceOf[Sequence]) -> list[GateReading]:
        """Cuts a step's readings to final positions, and reads now what sequences that `ended` have not reported."""
        for reading in readings:
            reading.keep_final()
        rest = self._read_now((sequence, sequence.final) for sequence in ended if sequence.is_served)
        return [*(reading for reading in readings if reading.spans), *rest]

    def drop(self, sequence: Sequence) -> None:
        """Reads the unreported rows of a sequence that ends early. Called before its blocks are released."""
        if sequence.is_served:
            self._dropped += self._read_now([(sequence, sequence.final)])

    def report(self, readings: SequenceOf[GateReading], stats: StepStats) -> dict[int, GateRows | None]:
        """The requested rows by the sequence's id(); adds to the step's statistics."""
        found: dict[int, GateRows | None] = {}
        for reading in (*self._dropped, *readings):
            own, rows = reading.read()
            stats.gate.add(own)
            found |= rows
        self._dropped.clear()
        return found

    def log(self, launched: LaunchedStep, results: SequenceOf[SequenceResult]) -> None:
        """Takes the gate logits of a step for the scalings log."""
        if not self.logs_scalings:
            return
        for result in results:
            one = result.scheduled
            gate_logits = launched.read_gate_logits(one) if one.sequence.is_served else None
            if gate_logits is not None:
                scalings_log.keep(one.sequence, one.scaling_start, gate_logits)
                self._log.collect(one.sequence, result.final)

    def flush(self, stats: StepStats, *, everything: bool = True) -> None:
        """Moves buffered rows of the scalings log to `stats`, when there are enough, or `everything` is to go."""
        stats.logged = self._log.take(everything=everything)

    def _read_now(self, ends: Iterable[tuple[Sequence, int]]) -> list[GateReading]:
        """A reading of final positions outside of any step. It only adds to statistics, because requested rows are read
        with their step; when memory runs out, these statistics are left out.
        """
        copies = HostCopies(self._kv_cache.gate_rows.device)
        try:
            with out_of_memory.recognised():
                readings = self._read(report_spans(ends), copies)
        except out_of_memory.OutOfMemory as error:
            logger.warning("the gate's statistics lack the last positions of a request: out of memory: %s", error)
            return []
        for reading in readings:
            copies.close()
            reading.keep_final()
        return readings

    def _read(self, spans: list[ReportSpan], copies: HostCopies) -> list[GateReading]:
        """A reading of stored gate rows; none without spans."""
        if not spans:
            return []
        size, stored = self._kv_cache.block_size, self._kv_cache.gate_rows
        slots = [slot for s in spans for slot in gate_slots(s.sequence, s.start, s.count, size)]
        if stored.is_cpu:  # numpy has less overhead per call
            scalings = torch.from_numpy(stored.numpy().take(slots, 0))
        else:
            scalings = stored.index_select(0, to_device(slots, stored.device))
        return [GateReading(spans, scalings, self._num_sites, copies)]


def requested_rows(
    spans: SequenceOf[ReportSpan], scalings: Tensor | None, summary: GateSummary, num_sites: int
) -> list[GateRows | None]:
    """The rows that each span's request returns; None where it returns none. scalings [n, S, E] (S may be 1: the same
    row at every site) are needed where a request returns full rows.
    """
    full = None if scalings is None else scalings.expand(-1, num_sites, -1).numpy()
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
    """Statistics of served positions. Adds to each sequence's usage those of its positions from the prompt's last on,
    where any expert acted.
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
