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

from service.contract.output import GateRows, GateStats, StepStats
from service.engine.gate import scalings_log
from service.engine.model_runner import SequenceResult
from service.engine.sequence import Sequence
from service.engine.slots import gate_slots
from service.model.classifier import Classifier
from service.model.gate_stats import GateSummary, summarise
from service.model.kv_cache import KVCache
from service.model.transfer import to_device

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


class GateReporter:
    """Reads gate rows back once their positions are final: for the requests that asked, for the metrics, and the
    classifier's logits for the scalings log.
    """

    def __init__(self, kv_cache: KVCache, classifier: Classifier, num_sites: int) -> None:
        self.logs_scalings = False
        self._kv_cache, self._classifier, self._num_sites = kv_cache, classifier, num_sites
        self._stats = GateStats()  # of what has been observed since they were last taken
        self._skipped = 0  # steps since all were read
        self._outgoing = scalings_log.Outgoing(classifier)

    def report(
        self, results: SequenceOf[SequenceResult], ended: SequenceOf[Sequence], stats: StepStats
    ) -> list[GateRows | None]:
        """The rows that have become final, for each of a step's sequences that asked; adds to the step's statistics.

        Called when the drafts have been verified and before any block is released. Nothing is left of those that
        `ended`.
        """
        served = [result.scheduled.sequence for result in results if result.scheduled.sequence.is_served]
        rows = self._observe(self.due(served, ended))
        found = [
            rows.get(id(result.scheduled.sequence)) if result.scalings is None else self._alone(result, result.scalings)
            for result in results
        ]
        if self.logs_scalings:
            for result in results:
                if result.gate_logits is not None:
                    sequence = result.scheduled.sequence
                    scalings_log.keep(sequence, result.scheduled.scaling_start, result.gate_logits)
                    self._outgoing.collect(sequence)
        self.flush(stats, everything=bool(ended))
        return found

    def drop(self, sequence: Sequence) -> None:
        """Takes in what a sequence that ends early has not reported yet. Called before its blocks are released."""
        if sequence.is_served:
            self._observe([sequence])

    def flush(self, stats: StepStats, *, everything: bool = True) -> None:
        """Adds what has been observed since the last step to `stats`; the log's rows, when they are enough together or
        `everything` is to come.
        """
        stats.gate, self._stats = self._stats, GateStats()
        stats.logged = self._outgoing.take(everything=everything)

    def due(self, sequences: list[Sequence], ended: SequenceOf[Sequence]) -> list[Sequence]:
        """Those of a step's sequences that are to report what has become final of them: who has asked for rows, is at
        its first, or has ended, at once; else all, several steps in one go, because a summary costs nearly the same for
        one row as for dozens.
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

    def _observe(self, sequences: list[Sequence]) -> dict[int, GateRows | None]:
        """Everything that has become final, read in one go, into the statistics and the usage of each. Returns the rows
        that were asked for, by the sequence's id().
        """
        spans = report_spans(sequences)
        if not spans:
            return {}
        size = self._kv_cache.block_size
        scalings = self._stored([slot for s in spans for slot in gate_slots(s.sequence, s.start, s.count, size)])
        summary = summarise(scalings)
        self._stats.add(gate_stats(spans, summary))
        observed = asked_rows(spans, scalings, summary, self._num_sites)
        for span in spans:
            span.sequence.reported = span.start + span.count
        return {id(span.sequence): one for span, one in zip(spans, observed, strict=True)}

    def _alone(self, result: SequenceResult, scalings: Tensor) -> GateRows | None:
        """The rows of a scaling pass alone, from its own scalings [scaling_count, S, E]."""
        for span in report_spans([result.scheduled.sequence]):
            own = scalings[span.start - result.scheduled.scaling_start :]
            [rows] = asked_rows([span], own, summarise(own), self._num_sites)
            span.sequence.reported = span.start + span.count
            return rows
        return None

    def _stored(self, slots: list[int]) -> Tensor:
        """A copy of gate rows [n, S, E]."""
        stored = self._kv_cache.gate_rows
        if stored.is_cpu:  # numpy's calls cost less
            return torch.from_numpy(stored.numpy().take(slots, 0))
        return stored.index_select(0, to_device(slots, stored.device))


def asked_rows(
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
