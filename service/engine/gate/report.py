"""What a step tells the outside about its gate: rows for those who asked, statistics for the metrics.

A position is reported once, when its real row has run and was kept (or its scaling row has run, for a scaling pass
alone): only then are its scalings sure to be used. Rows found in the prefix cache, or computed again after a
preemption, are read from the cache, so what a request gets is complete and nothing is counted twice.
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

_STEPS_TOGETHER = 64


@dataclass(slots=True)
class ReportSpan:
    """Positions start .. start + count of one sequence, at rows offset .. offset + count of a reading."""

    sequence: Sequence
    start: int
    count: int
    offset: int


class GateReading:
    """Gate rows on their way from the device."""

    def __init__(self, spans: list[ReportSpan], scalings: Tensor, num_sites: int, copies: HostCopies) -> None:
        """scalings [n, S, E] of all spans in their order (S may be 1: the same row at every site). They must not change
        any more where they are a CPU's.
        """
        self.spans = spans
        self._rows = len(scalings)
        self._num_sites = num_sites
        self._copies = copies
        self._summary = PendingSummary(scalings, copies)
        asks = any(span.sequence.request.return_scalings == "full" for span in spans)
        self._full = copies.of(scalings) if asks else None

    def settle(self) -> None:
        """Leaves out what has not become final, and sequences that were dropped since. Once the drafts are verified."""
        for span in self.spans:
            sequence = span.sequence
            span.count = 0 if sequence.dropped else max(0, min(span.count, sequence.final - span.start))
            if span.count:
                sequence.reported = span.start + span.count
        self.spans = [span for span in self.spans if span.count]

    def read(self) -> tuple[GateStats, dict[int, GateRows | None]]:
        """The statistics of what is served, which go into the usage of each as well, and the rows that were asked for,
        by the sequence's id().
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
        observed = asked_rows(spans, full, summary, self._num_sites)
        return stats, {id(span.sequence): rows for span, rows in zip(spans, observed, strict=True)}


def report_spans(ends: Iterable[tuple[Sequence, int]]) -> list[ReportSpan]:
    """The positions that are not reported yet of each sequence, up to an end; empty spans are left out."""
    spans: list[ReportSpan] = []
    offset = 0
    for sequence, end in ends:
        start = sequence.reported
        if end > start:
            spans.append(ReportSpan(sequence, start, end - start, offset))
            offset += end - start
    return spans


class GateReporter:
    """Reads gate rows back once their positions are final: for the requests that asked, for the metrics, and the
    classifier's logits for the scalings log.

        launch   with the step: copies of all rows that may become final in it are queued behind it
        settle   when its drafts have been verified, before any block is released: what has become final of them
        report   while the next step runs: rows and statistics
    """

    def __init__(self, kv_cache: KVCache, classifier: Classifier, num_sites: int) -> None:
        self.logs_scalings = False
        self._kv_cache, self._num_sites = kv_cache, num_sites
        self._dropped: list[GateReading] = []  # of sequences that ended between two steps
        self._skipped = 0  # steps since all were read
        self._outgoing = scalings_log.Outgoing(classifier)

    def launch(self, launched: LaunchedStep) -> list[GateReading]:
        """Reads what may become final in a step that has just been launched. Raises OutOfMemory."""
        with out_of_memory.told_apart():
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
        """Those of a step's sequences that are read with it: who has asked for rows, is at its prompt, or may have all
        its tokens after it; else all, several steps in one go, because a summary costs nearly the same for one row as
        for dozens.
        """
        self._skipped += 1
        if self._skipped >= _STEPS_TOGETHER:
            self._skipped = 0
            return scheduled
        return [
            one
            for one in scheduled
            if one.sequence.reported < one.sequence.prompt_len
            or one.sequence.request.return_scalings != "none"
            or one.sequence.output_len + one.samples >= one.sequence.sampling.max_tokens
        ]

    def settle(self, readings: list[GateReading], ended: SequenceOf[Sequence]) -> list[GateReading]:
        """What has become final in a step, and of those that `ended` all that is left, which is read now."""
        for reading in readings:
            reading.settle()
        rest = self._read_now((sequence, sequence.final) for sequence in ended if sequence.is_served)
        return [*(reading for reading in readings if reading.spans), *rest]

    def drop(self, sequence: Sequence) -> None:
        """Reads what a sequence that ends early has not reported yet. Called before its blocks are released."""
        if sequence.is_served:
            self._dropped += self._read_now([(sequence, sequence.final)])

    def report(self, readings: SequenceOf[GateReading], stats: StepStats) -> dict[int, GateRows | None]:
        """The rows that were asked for, by the sequence's id(); adds to the step's statistics."""
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
                self._outgoing.collect(one.sequence, result.final)

    def flush(self, stats: StepStats, *, everything: bool = True) -> None:
        """Adds the log's rows to `stats`, when they are enough together or `everything` is to come."""
        stats.logged = self._outgoing.take(everything=everything)

    def _read_now(self, ends: Iterable[tuple[Sequence, int]]) -> list[GateReading]:
        """A reading of what is final already, apart from any step: nothing but statistics, because rows that somebody
        has asked for are read with their step. Where there is no memory for it they are left out.
        """
        copies = HostCopies(self._kv_cache.gate_rows.device)
        try:
            with out_of_memory.told_apart():
                readings = self._read(report_spans(ends), copies)
        except out_of_memory.OutOfMemory as error:
            logger.warning("the gate's statistics lack the last positions of a request: out of memory: %s", error)
            return []
        for reading in readings:
            copies.close()
            reading.settle()
        return readings

    def _read(self, spans: list[ReportSpan], copies: HostCopies) -> list[GateReading]:
        """A reading of stored rows; none where there is nothing to read."""
        if not spans:
            return []
        size, stored = self._kv_cache.block_size, self._kv_cache.gate_rows
        slots = [slot for s in spans for slot in gate_slots(s.sequence, s.start, s.count, size)]
        if stored.is_cpu:  # numpy's calls cost less
            scalings = torch.from_numpy(stored.numpy().take(slots, 0))
        else:
            scalings = stored.index_select(0, to_device(slots, stored.device))
        return [GateReading(spans, scalings, self._num_sites, copies)]


def asked_rows(
    spans: SequenceOf[ReportSpan], scalings: Tensor | None, summary: GateSummary, num_sites: int
) -> list[GateRows | None]:
    """The rows that each span's request asked for. scalings [n, S, E] (S may be 1: the same row at every site), where
    any asks for all of them.
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
