"""ModelRunner: has a step's flat batch built, runs the model once, samples tokens and drafts. It decides nothing."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.contract.errors import InvalidRequestError
from service.contract.output import Failure, TokenOutput
from service.contract.steering import GateSettings
from service.engine.batch_builder import BatchBuilder
from service.engine.plan import ScheduledSequence
from service.engine.sampler import SampleRow, sample, token_outputs, with_logprobs
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step
from service.model.transfer import read_with_finite, to_device
from service.model.xlora_model import XLoraModel

logger = logging.getLogger(__name__)


class OutOfMemory(Exception):
    """A step needs more memory than there is."""


@dataclass(slots=True)
class SequenceResult:
    """The outcome of one step for one scheduled sequence."""

    scheduled: ScheduledSequence
    tokens: list[TokenOutput] = field(default_factory=list)  # sampled from the real rows, first position first
    predictions: list[int] = field(default_factory=list)  # sampled from the scaling rows
    prompt_logprobs: list[TokenOutput] = field(default_factory=list)  # of the tokens after positions `scores`
    error: Failure | None = None  # why the sequence cannot go on; it has nothing else then
    finite: bool = True  # False: NaN or infinity in what the sequence would go on with
    scalings: Tensor | None = None  # [scaling_count, S, E] of a scaling pass alone: they are stored nowhere
    gate_logits: npt.NDArray[np.float32] | None = None  # [scaling_count, S, E], where they are to be kept


class ModelRunner:
    """Owns the model and the KV cache, on one device."""

    def __init__(self, model: XLoraModel, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self._step: Step = model
        self._next_step: Step | None = None
        self._batches = BatchBuilder(kv_cache, model.sites)

    @property
    def step(self) -> Step:
        """The step that computes batches. Only the engine's thread asks: one that was handed over is taken now."""
        if self._next_step is not None:
            self._step, self._next_step = self._next_step, None
        return self._step

    @step.setter
    def step(self, step: Step) -> None:
        self._step, self._next_step = step, None

    def hand_over(self, step: Step) -> None:
        """Gives the engine's thread another step, from whichever thread."""
        self._next_step = step

    def run(self, scheduled: list[ScheduledSequence], *, keep_gate_logits: bool = False) -> list[SequenceResult]:
        """One forward over everything scheduled, then sampling of tokens and predictions in one go.

        Raises OutOfMemory; then nothing has changed but what the next step will write again.
        """
        try:
            output = self.step.forward(self._batches.build(scheduled), self.kv_cache)
            results = self._sampled(output, scheduled)
            gate_logits = output.gate_logits.to("cpu", copy=True).numpy() if keep_gate_logits else None
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(str(error)) from error
        for one, result in zip(scheduled, results, strict=True):
            rows = slice(one.scaling_row, one.scaling_row + one.scaling_count)
            if not one.sequence.generates:
                result.scalings = output.scalings[rows]
            if gate_logits is not None and one.sequence.is_served:
                result.gate_logits = gate_logits[rows]
        return results

    def free_memory(self) -> None:
        """Gives back what torch keeps for later, after OutOfMemory."""
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def dummy_row(self, settings: GateSettings, weight: float) -> bytes | None:
        """The gate row of the scaling pass under `settings`, times `weight`; None where it is the model's own."""
        row = self.model.classifier.dummy_row_of(settings.scaling_pass_value, settings.top_k_lora) * weight
        return None if torch.equal(row, self.model.dummy_row.cpu()) else row.numpy().tobytes()

    def _sampled(self, output: ForwardOutput, scheduled: list[ScheduledSequence]) -> list[SequenceResult]:
        """Samples every sequence and marks those whose numbers are not finite.

        Where sampling raises, every sequence is sampled alone, and one that raises again has an error. A grammar that
        has become too complex is its request's fault, and nothing to log.
        """
        marks = _marks(output)
        try:
            results, finite = _sample(output.logits, marks, scheduled)
        except InvalidRequestError:
            results, finite = _sample_each(output.logits, marks, scheduled)
        except Exception:
            logger.exception("sampling failed; every sequence is sampled alone")
            results, finite = _sample_each(output.logits, marks, scheduled)
        if not all(finite):
            for result in results:
                result.finite = _is_finite(result.scheduled, finite, len(output.logits))
        return results


def _sample(
    logits: Tensor, marks: Tensor, scheduled: list[ScheduledSequence]
) -> tuple[list[SequenceResult], list[bool]]:
    """logits [L, V] of `scheduled`, sequence by sequence -> what they say; and which of `marks` is finite."""
    rows: list[SampleRow] = []
    scored: list[int] = []
    for one in scheduled:
        drafts = one.sequence.drafts
        first = one.predict_start - len(one.sequence.tokens)
        rows += (SampleRow(one.sequence, drafts[:count]) for count in range(one.samples))
        rows += (SampleRow(one.sequence, drafts[: first + i], drafted=True) for i in range(one.predict_count))
        scored += range(len(rows) + len(scored), len(rows) + len(scored) + len(one.scores))
    sampled, ids = logits, marks.new_empty(0, dtype=torch.int64)
    if scored:
        sampled = logits.index_select(0, to_device(sorted({*range(len(logits))} - {*scored}), logits.device))
    if rows:
        ids = sample(sampled, rows)
    read, finite = read_with_finite(ids, marks)
    tokens, scores = iter(token_outputs(sampled, rows, read)), iter(_scores(logits, scored, scheduled))
    results = [
        SequenceResult(
            one,
            tokens=list(islice(tokens, one.samples)),
            predictions=[token.id for token in islice(tokens, one.predict_count)],
            prompt_logprobs=list(islice(scores, len(one.scores))),
        )
        for one in scheduled
    ]
    return results, finite


def _sample_each(
    logits: Tensor, marks: Tensor, scheduled: list[ScheduledSequence]
) -> tuple[list[SequenceResult], list[bool]]:
    """The same, every sequence alone."""
    results: list[SequenceResult] = []
    for one in scheduled:
        try:
            results += _sample(logits[one.logit_row : one.logit_row + one.logit_count], marks[:0], [one])[0]
        except Exception as error:
            if not isinstance(error, InvalidRequestError):
                logger.exception("sampling failed for request %s", one.sequence.request.id)
            results.append(SequenceResult(one, error=Failure.of(error, "sampling failed")))
    return results, read_with_finite(marks.new_empty(0, dtype=torch.int64), marks)[1]


def _marks(output: ForwardOutput) -> Tensor:
    """fp32 [L + scaling rows]: one number per row of the logits, then of the gate logits, finite where the row is.

    -inf among logits is how some families rule out ids: their rows are judged by the largest, which NaN and infinity
    win; gate rows by the sum.
    """
    return torch.cat([output.logits.float().amax(-1), output.gate_logits.sum((1, 2))])


def _is_finite(one: ScheduledSequence, finite: list[bool], logit_rows: int) -> bool:
    """Whether all that a sequence would go on with is finite: its gate rows, and the logits that it is sampled or
    scored by. Those that only predict drafts do not count.
    """
    predicted = one.logit_row + one.samples
    counted = [
        *finite[one.logit_row : predicted],
        *finite[predicted + one.predict_count : one.logit_row + one.logit_count],
        *finite[logit_rows + one.scaling_row : logit_rows + one.scaling_row + one.scaling_count],
    ]
    return all(counted)


def _scores(logits: Tensor, rows: list[int], scheduled: list[ScheduledSequence]) -> list[TokenOutput]:
    """`rows` of the logits [L, V], those of every position of `scores` -> the prompt's next tokens."""
    if not rows:
        return []
    tokens, alternatives = [], []
    for one in scheduled:
        tokens += [one.sequence.tokens[position + 1] for position in one.scores]
        alternatives += [one.sequence.sampling.prompt_logprobs or 0 for _ in one.scores]
    return with_logprobs(logits.index_select(0, to_device(rows, logits.device)), tokens, alternatives)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
