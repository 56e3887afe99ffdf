"""ModelRunner: builds a plan's batch, launches forward and sampling, and queues copies of the results.

Decides nothing: which rows run is the scheduler's, what the results mean for sequences is the engine's.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from service.contract.errors import InvalidRequestError
from service.contract.output import Failure
from service.contract.steering import GateSettings
from service.engine import out_of_memory
from service.engine.batch_builder import BatchBuilder
from service.engine.launched_step import LaunchedStep, SequenceResult
from service.engine.logprobs import Logprobs
from service.engine.plan import ScheduledSequence
from service.engine.sampler import SampleRow, sample, take_argmax
from service.engine.speculation.layer_drafts import draft_ahead
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step
from service.model.transfer import HostCopies, pack_to_device, to_device
from service.model.xlora_model import XLoraModel

logger = logging.getLogger(__name__)


class ModelRunner:
    """Owns the model and the KV cache, on one device."""

    def __init__(self, model: XLoraModel, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self._step: Step = model
        self._next_step: Step | None = None
        self.on_other_step: Callable[[], None] = lambda: None  # called in the engine's thread after a swap
        self._batches = BatchBuilder(kv_cache, model.sites)
        self._dummy_row = model.dummy_row.cpu()
        self.overlapped_rows = 0  # launch() of up to this many rows returns long before the device has finished

    @property
    def step(self) -> Step:
        """The step that computes batches. Only the engine's thread may ask: it swaps in a step that was handed over."""
        if self._next_step is not None:
            self.step = self._next_step
            self.on_other_step()
        return self._step

    @step.setter
    def step(self, step: Step) -> None:
        self._step, self._next_step = step, None

    def hand_over(self, step: Step) -> None:
        """Gives the engine another step, from any thread; it is swapped in before the next batch."""
        self._next_step = step

    def launch(self, scheduled: list[ScheduledSequence], *, keep_gate_logits: bool = False) -> LaunchedStep:
        """Queues one forward over everything scheduled, the sampling of tokens and predictions, and copies of the
        results, which the caller closes.

        Raises OutOfMemory. The plan can then be launched again: all that has been written is overwritten.
        """
        with out_of_memory.recognised():
            step = self.step
            output = step.forward(self._batches.build(scheduled), self.kv_cache)
            launched, ids = _sampled(output, scheduled, keep_gate_logits=keep_gate_logits)
        self._draft_ahead(step, output, launched, ids)
        return launched

    def _draft_ahead(self, step: Step, output: ForwardOutput, launched: LaunchedStep, ids: Tensor) -> None:
        """Queues the draft layer behind the step. Its failure costs the step nothing but drafts."""
        try:
            drafts = draft_ahead(step, launched.scheduled, ids, output, self.kv_cache)
        except Exception:
            logger.exception("the draft layer failed: this step drafts a token at a time")
            return
        if drafts is not None:
            launched.drafting, launched.deeper = drafts[0], launched.copies.of(drafts[1])

    def collect(self, launched: LaunchedStep) -> list[SequenceResult]:
        """Waits for a step's sampled ids. One result per scheduled sequence, in the same order."""
        return launched.collect()

    def free_memory(self) -> None:
        """Empties torch's memory cache, after OutOfMemory."""
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def dummy_row(self, settings: GateSettings, weight: float) -> bytes | None:
        """The gate row of the scaling pass under `settings`, times `weight`; None where it equals the checkpoint's."""
        row = self.model.classifier.dummy_row_of(settings.scaling_pass_value, settings.top_k_lora) * weight
        return None if torch.equal(row, self._dummy_row) else row.numpy().tobytes()


def _sampled(
    output: ForwardOutput, scheduled: list[ScheduledSequence], *, keep_gate_logits: bool
) -> tuple[LaunchedStep, Tensor]:
    """Samples every sequence, and queues copies of the step's results. Also returns the sampled ids, int64 [R], on the
    device.
    """
    copies = HostCopies(output.logits.device)
    logits, scores = _split(output.logits, scheduled, copies)
    rows = [_sample_rows(one) for one in scheduled]
    ids, errors = _sample(logits, rows)
    are_largest = scores is None and not errors and take_argmax(list(chain(*rows)))
    is_read_later = any(not one.sequence.generates for one in scheduled)  # when the draft layer has run as well
    launched = LaunchedStep(
        scheduled,
        copies,
        copies.of(ids),
        copies.of(_marks(output, ids if are_largest else None)),
        output.scalings.clone() if is_read_later else output.scalings,
        len(output.logits),
        errors,
        scores=scores,
    )
    counts = [(number, row.logprobs) for number, row in enumerate(chain(*rows)) if row.logprobs is not None]
    if counts:
        launched.logprob_rows = [number for number, _ in counts]
        index = to_device(launched.logprob_rows, ids.device)
        launched.logprobs = Logprobs(
            logits.index_select(0, index), ids.index_select(0, index), [count for _, count in counts], copies
        )
    if keep_gate_logits:
        launched.gate_logits = copies.of(output.gate_logits)
    return launched, ids


def _split(logits: Tensor, scheduled: list[ScheduledSequence], copies: HostCopies) -> tuple[Tensor, Logprobs | None]:
    """Splits logits [L, V] of `scheduled`, sequence by sequence, into the rows that are sampled from, and the logprobs
    of prompt tokens at the other rows.
    """
    scored: list[int] = []
    tokens: list[int] = []
    alternatives: list[int] = []
    for one in scheduled:
        if one.scores:
            first = one.logit_row + one.samples + one.predict_count
            scored += range(first, first + len(one.scores))
            tokens += one.sequence.tokens[one.scores.start + 1 : one.scores.stop + 1]
            alternatives += [one.sequence.sampling.prompt_logprobs or 0] * len(one.scores)
    if not scored:
        return logits, None
    others = sorted({*range(len(logits))} - {*scored})
    columns = [np.array(column, np.int64) for column in (scored, tokens, others)]
    index, own, sampled = pack_to_device(columns, logits.device)
    return logits.index_select(0, sampled), Logprobs(logits.index_select(0, index), own, alternatives, copies)


def _sample_rows(one: ScheduledSequence) -> list[SampleRow]:
    """The rows to sample for a sequence: its samples, then its predictions."""
    sequence, drafts = one.sequence, one.sequence.drafts
    first = one.predict_start - len(sequence.tokens)
    rows = [SampleRow(sequence, drafts[:count]) for count in range(one.samples)]
    rows += [SampleRow(sequence, drafts[: first + count], drafted=True) for count in range(one.predict_count)]
    return rows


def _sample(logits: Tensor, rows: list[list[SampleRow]]) -> tuple[Tensor, dict[int, Failure]]:
    """Samples logits [R, V] of the rows of each sequence. Returns ids, int64 [R], and errors by index in `rows`.

    When sampling raises, every sequence is sampled alone, and those that raise again have an error. A grammar that has
    become too complex (InvalidRequestError) is its request's fault, and not logged.
    """
    try:
        flat = list(chain(*rows))
        return (sample(logits, flat) if flat else logits.new_empty(0, dtype=torch.int64)), {}
    except InvalidRequestError:
        pass
    except Exception:
        logger.exception("sampling failed; every sequence is sampled alone")
    ids = [logits.new_empty(0, dtype=torch.int64)]
    errors: dict[int, Failure] = {}
    for number, (own, part) in enumerate(zip(rows, torch.split(logits, [len(own) for own in rows]), strict=True)):
        try:
            ids.append(sample(part, own) if own else ids[0])
        except Exception as error:
            if not isinstance(error, InvalidRequestError):
                logger.exception("sampling failed for request %s", own[0].sequence.request.id)
            errors[number] = Failure.of(error, "sampling failed")
            ids.append(ids[0].new_zeros(len(own)))
    return torch.cat(ids), errors


def _marks(output: ForwardOutput, largest: Tensor | None) -> Tensor:
    """fp32 [L + scaling rows]: one number per row of the logits, then of the gate logits, finite if the row is.

    Some families rule out ids with -inf among the logits, so a row's mark is its maximum, which NaN and +inf win; for
    gate logits it is the sum. `largest`, int64 [L], is the argmax if it is known, which saves reading [L, V] again.
    """
    logits = output.logits
    of_rows = logits.amax(-1) if largest is None else logits.gather(-1, largest[:, None])[:, 0]
    return torch.cat([of_rows.float(), output.gate_logits.sum((1, 2))])
