"""A plan in, tokens and gate rows out: has the flat batch built, runs the model once, samples. Decides nothing."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from service.contract.errors import InvalidRequestError
from service.contract.output import Failure, GateRows, GateStats, LoggedRows, TokenOutput
from service.contract.steering import GateSettings, Steering
from service.engine.batch_builder import BatchBuilder, Segment, ordered_segments
from service.engine.gate import admitted_gate, scalings_log
from service.engine.gate.report import GateObserver, gate_rows, report_spans
from service.engine.gate.steering import excluded_experts, fixed_row
from service.engine.sampler import SampleRow, sample, token_outputs, with_logprobs
from service.engine.scheduler import Plan, Scheduled
from service.engine.sequence import Sequence
from service.engine.tensor_parallel.group import Leader
from service.model.gate_stats import summarise
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step
from service.model.transfer import read_with_finite, to_device
from service.model.xlora_model import XLoraModel

logger = logging.getLogger(__name__)


class OutOfMemory(Exception):
    """A step needs more memory than there is."""


@dataclass(slots=True)
class RunResult:
    """What one step brought, aligned with the plan's `scheduled`."""

    tokens: list[list[TokenOutput]] = field(default_factory=list)  # sampled from the real rows, first position first
    predictions: list[list[int]] = field(default_factory=list)  # sampled from the scaling rows
    prompt_logprobs: list[list[TokenOutput]] = field(default_factory=list)  # of the tokens after positions `scores`
    scalings: list[Tensor | None] = field(default_factory=list)  # [scaling_count, S, E] of a scaling pass alone: they
    # are stored nowhere
    errors: list[Failure | None] = field(default_factory=list)  # why a sequence cannot go on; it has nothing else then
    finite: list[bool] = field(default_factory=list)  # False: NaN or infinity in what a sequence would go on with

    def extend(self, other: RunResult) -> None:
        """Adds other sequences' results, but for their scalings and whether they are finite."""
        self.tokens += other.tokens
        self.predictions += other.predictions
        self.prompt_logprobs += other.prompt_logprobs
        self.errors += other.errors


class ModelRunner:
    """Owns the model and the KV cache, on one device."""

    def __init__(self, model: XLoraModel, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.step: Step = model  # what computes a batch; another thread may replace it
        self.leader: Leader | None = None  # of a tensor-parallel group: the step, which also hears of gate rows
        self.logs_scalings = False
        self._outgoing = scalings_log.Outgoing()
        self._observer = GateObserver(len(model.sites))
        self.batches = BatchBuilder(kv_cache, model.device)

    def run(self, plan: Plan) -> RunResult:
        """One forward over everything scheduled, then sampling of tokens and predictions in one go.

        Raises OutOfMemory; then nothing has changed but what the next step will write again.
        """
        try:
            return self._run(plan.scheduled)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(str(error)) from error

    def _run(self, shares: list[Scheduled]) -> RunResult:
        segments = ordered_segments(shares)
        first_rows = {(id(s.share), s.is_scaling): s.row for s in segments}
        token_rows: list[int] = []
        prediction_rows: list[int] = []
        score_rows: list[int] = []
        for share in shares:
            real = first_rows.get((id(share), False), 0) - share.real_start
            scaling = first_rows.get((id(share), True), 0) - share.scaling_start
            token_rows += range(real + share.real_end - share.samples, real + share.real_end)
            first = scaling + share.predict_start - 1
            prediction_rows += range(first, first + share.predict_count)
            if share.scores:
                score_rows += range(real + share.scores.start, real + share.scores.stop)
        logit_rows = token_rows + prediction_rows + score_rows
        batch = self.batches.build(segments, logit_rows)
        steered = [share for share in shares if share.sequence.request.steering is not None]
        self._write_fixed_rows(steered)
        admitted_gate.write_dummy_rows(self.kv_cache, shares, self._store_gate_rows)
        admitted_gate.weigh(self.kv_cache, batch.gate_slots, _other_weights(segments), self._store_gate_rows)
        output = self.step.forward(batch, self.kv_cache)
        if steered:
            self._steer(output.gate_logits, segments)
        if self.logs_scalings:
            self._log(output.gate_logits, segments)
        result, finite = self._read(output.logits, _marks_of_rows(output), shares)
        result.finite = _finite_shares(shares, finite, first_rows, len(logit_rows))
        result.scalings = [self._scalings_alone(share, output, first_rows) for share in shares]
        return result

    def free_memory(self) -> None:
        """Gives back what torch keeps for later, after OutOfMemory."""
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- steering ------------------------------------------------------------------------------------------------

    def _write_fixed_rows(self, shares: list[Scheduled]) -> None:
        """Stores the row of every fixed gate at position 0, when that is computed; cached blocks have it already."""
        for share in shares:
            steering = share.sequence.request.steering
            if steering is not None and steering.weights is not None and share.real_start == 0:
                sites, experts = self.kv_cache.gate_rows.shape[1:]
                row = fixed_row(steering.weights, self.model.sites[:sites], experts)
                slots = self.batches.slots(share.sequence.real, 0, 1)
                self._store_gate_rows(slots, torch.tensor([row], device=self.model.device))

    def dummy_row(self, settings: GateSettings, weight: float) -> bytes | None:
        """The gate row of the scaling pass under `settings`, times `weight`; None where it is the model's own."""
        row = self.model.classifier.dummy_row_of(settings.scaling_pass_value, settings.top_k_lora) * weight
        return None if torch.equal(row, self.model.dummy_row.cpu()) else row.numpy().tobytes()

    def _log(self, gate_logits: Tensor, segments: list[Segment]) -> None:
        """Keeps what the classifier said until it is known which of it is."""
        said = gate_logits.to("cpu", copy=True).numpy()  # whose slices cost less
        for segment in segments:
            if segment.is_scaling and segment.share.sequence.is_served:
                rows = said[segment.row : segment.row + segment.count]
                scalings_log.keep(segment.share.sequence, segment.start, rows)

    def logged(self, sequences: list[Sequence], *, everything: bool) -> list[LoggedRows]:
        """What has become final for the scalings log, of these and earlier ones; a step may leave it to a later one,
        unless `everything` is to come. Call it when drafts are verified.
        """
        if self.logs_scalings:
            for sequence in sequences:
                self._outgoing.collect(sequence)
        return self._outgoing.take(self._said, everything=everything)

    def _said(self, gate_logits: scalings_log.Rows) -> scalings_log.Rows:
        """Rows of the scalings log."""
        said: scalings_log.Rows = self.model.classifier.before_top_k(torch.from_numpy(gate_logits)).numpy()
        return said

    def _steer(self, gate_logits: Tensor, segments: list[Segment]) -> None:
        """Replaces the scalings that the step has stored for steered requests; one go for those with equal steering."""
        steered: dict[Steering, tuple[list[int], list[int]]] = {}  # rows, slots
        for segment in segments:
            steering = segment.share.sequence.request.steering
            if segment.is_scaling and steering is not None and segment.share.sequence.generates:
                rows, slots = steered.setdefault(steering, ([], []))
                rows += range(segment.row, segment.row + segment.count)
                slots += self.batches.new_gate_slots(segment)
        for steering, (rows, slots) in steered.items():
            self._store_gate_rows(slots, self._scalings(gate_logits[self._tensor(rows)], steering))

    def _store_gate_rows(self, slots: list[int], rows: Tensor) -> None:
        """Writes gate rows [n, S, E]; those that a forward makes it writes itself."""
        self.kv_cache.gate_rows.index_copy_(0, self._tensor(slots), rows)
        if self.leader is not None:
            self.leader.store_gate_rows(slots, rows)

    def _stored_gate_rows(self, slots: list[int]) -> Tensor:
        """A copy of gate rows [n, S, E]."""
        stored = self.kv_cache.gate_rows
        if stored.is_cpu:  # numpy's calls cost less
            return torch.from_numpy(stored.numpy().take(slots, 0))
        return stored.index_select(0, self._tensor(slots))

    def _scalings(self, gate_logits: Tensor, steering: Steering | None) -> Tensor:
        """Gate logits [n, S, E] to scalings, as one request wants them."""
        classifier = self.model.classifier
        if steering is None:
            return classifier.scalings(gate_logits)
        return classifier.scalings(
            gate_logits,
            excluded=excluded_experts(steering, classifier.num_experts),
            temperature=steering.temperature,
            top_k=steering.top_k,
        )

    def _scalings_alone(
        self, share: Scheduled, output: ForwardOutput, first_rows: dict[tuple[int, bool], int]
    ) -> Tensor | None:
        """The new scalings of a scaling pass alone."""
        if share.sequence.generates:
            return None
        row = first_rows[id(share), True]
        return self._scalings(output.gate_logits[row : row + share.scaling_count], share.sequence.request.steering)

    # -- sampling ------------------------------------------------------------------------------------------------

    def _read(self, logits: Tensor, marks: Tensor, shares: list[Scheduled]) -> tuple[RunResult, list[bool]]:
        """logits [L, V] in the order of _logit_rows -> what they say, without scalings; and which of `marks` is
        finite.

        Where that raises, every share is read alone, and one that raises again has an error. A form of text that has
        become too complex is its request's fault, and nothing to log.
        """
        try:
            return self._sample(logits, marks, shares)
        except InvalidRequestError:
            pass  # found below
        except Exception:
            logger.exception("sampling failed; every sequence is sampled alone")
        result = RunResult()
        for share, rows in zip(shares, _logit_rows(shares), strict=True):
            try:
                result.extend(self._sample(logits[rows], marks[:0], [share])[0])
            except Exception as error:
                if not isinstance(error, InvalidRequestError):
                    logger.exception("sampling failed for request %s", share.sequence.request.id)
                result.extend(RunResult([[]], [[]], [[]], errors=[Failure.of(error, "sampling failed")]))
        return result, read_with_finite(marks.new_empty(0, dtype=torch.int64), marks)[1]

    def _sample(self, logits: Tensor, marks: Tensor, shares: list[Scheduled]) -> tuple[RunResult, list[bool]]:
        rows: list[SampleRow] = []
        for share in shares:
            rows += (SampleRow(share.sequence, share.sequence.drafts[:count]) for count in range(share.samples))
        split = len(rows)
        for share in shares:
            first = share.predict_start - len(share.sequence.tokens)
            drafts = share.sequence.drafts
            rows += (SampleRow(share.sequence, drafts[: first + i]) for i in range(share.predict_count))
        scores = logits.shape[0] - len(rows)
        said = marks.new_empty(0, dtype=torch.int64)
        if rows:
            said = sample(logits[: len(rows)] if scores else logits, rows)
        ids, finite = read_with_finite(said, marks)
        tokens, predictions = iter(token_outputs(logits[:split], rows[:split], ids[:split])), iter(ids[split:])
        scored = iter(_score(logits[len(rows) :], shares)) if scores else iter(())
        result = RunResult(
            [list(islice(tokens, share.samples)) for share in shares],
            [list(islice(predictions, share.predict_count)) for share in shares],
            [list(islice(scored, len(share.scores))) for share in shares],
            errors=[None] * len(shares),
        )
        return result, finite

    def report(self, plan: Plan, result: RunResult, ended: list[Sequence]) -> tuple[list[GateRows | None], GateStats]:
        """The gate rows that have become final, for each of the plan's `scheduled` that asked, and statistics.

        Called when the drafts have been verified and before any block is released. Nothing is left of those that ended.
        """
        served = [share.sequence for share in plan.scheduled if share.sequence.is_served]
        rows = self._observe(self._observer.due(served, ended))
        for share, scalings in zip(plan.scheduled, result.scalings, strict=True):
            if scalings is not None:
                rows[id(share.sequence)] = self._report_alone(share, scalings)
        return [rows.get(id(share.sequence)) for share in plan.scheduled], self._observer.take_statistics()

    def observe_rest(self, sequence: Sequence) -> None:
        """Takes in what a sequence that is dropped has not reported yet. Called before its blocks are released."""
        if sequence.is_served:
            self._observe([sequence])

    def _observe(self, sequences: list[Sequence]) -> dict[int, GateRows | None]:
        """Everything that has become final, read in one go; the rows that were asked for, by the sequence's id()."""
        spans = report_spans(sequences)
        if not spans:
            return {}
        slots = [slot for s in spans for slot in self.batches.gate_slots(s.sequence, s.start, s.count)]
        observed = self._observer.observe(spans, self._stored_gate_rows(slots))
        for span in spans:
            span.sequence.reported = span.start + span.count
        return {id(span.sequence): one for span, one in zip(spans, observed, strict=True)}

    def _report_alone(self, share: Scheduled, scalings: Tensor) -> GateRows | None:
        """The rows of a scaling pass alone, from its own scalings [scaling_count, S, E]."""
        for span in report_spans([share.sequence]):
            own = scalings[span.start - share.scaling_start :]
            [rows] = gate_rows([span], own, summarise(own), len(self.model.sites))
            span.sequence.reported = span.start + span.count
            return rows
        return None

    def take_statistics(self) -> GateStats:
        """Statistics that no step has reported: of sequences that were dropped since."""
        return self._observer.take_statistics()

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(values, self.model.device)


def _logit_rows(shares: list[Scheduled]) -> list[list[int]]:
    """Whose the rows of the logits are: first those of all tokens, then of all predictions, then of all scores."""
    rows: list[list[int]] = [[] for _ in shares]
    first = 0
    for counts in zip(*((share.samples, share.predict_count, len(share.scores)) for share in shares), strict=True):
        for own, count in zip(rows, counts, strict=True):
            own += range(first, first + count)
            first += count
    return rows


def _marks_of_rows(output: ForwardOutput) -> Tensor:
    """fp32 [L + scaling rows]: one number per row of the logits, then of the gate logits, finite where the row is.

    -inf among logits is how some families rule out ids: their rows are judged by the largest, which NaN and infinity
    win; gate rows by the sum.
    """
    gates = output.gate_logits
    return torch.cat([output.logits.float().amax(-1), gates.sum((1, 2))])


def _finite_shares(
    shares: list[Scheduled], finite: list[bool], first_rows: dict[tuple[int, bool], int], logit_rows: int
) -> list[bool]:
    """Whether all that each sequence would go on with is finite: its gate rows, and the logits that it is sampled or
    scored by. Those that only predict drafts do not count.
    """
    if all(finite):
        return [True] * len(shares)
    found = []
    for share, own in zip(shares, _logit_rows(shares), strict=True):
        counted = own[: share.samples] + own[share.samples + share.predict_count :]
        first = logit_rows + first_rows.get((id(share), True), 0)
        found.append(all(finite[row] for row in (*counted, *range(first, first + share.scaling_count))))
    return found


def _score(logits: Tensor, shares: list[Scheduled]) -> list[TokenOutput]:
    """logits [n, V] of every position of `scores` -> the prompt's next tokens."""
    tokens, alternatives = [], []
    for share in shares:
        sequence = share.sequence
        tokens += [sequence.tokens[position + 1] for position in share.scores]
        alternatives += [sequence.sampling.prompt_logprobs or 0 for _ in share.scores]
    return with_logprobs(logits, tokens, alternatives)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _other_weights(segments: list[Segment]) -> dict[int, float]:
    """The real rows under another global weight than the checkpoint's, and that weight."""
    others = [s for s in segments if not s.is_scaling and s.share.sequence.gate.weight != 1.0]
    return {row: s.share.sequence.gate.weight for s in others for row in range(s.row, s.row + s.count)}
