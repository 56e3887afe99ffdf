"""ModelRunner: has a step's flat batch built, launches the model and the sampling of its rows. It decides nothing."""

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
from service.engine.speculation.chain import draft_ahead
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
        self.on_other_step: Callable[[], None] = lambda: None  # called by the engine's thread once it has taken one
        self._batches = BatchBuilder(kv_cache, model.sites)
        self._dummy_row = model.dummy_row.cpu()
        self.overlapped_rows = 0  # launch() of up to so many rows returns long before the device has done the work

    @property
    def step(self) -> Step:
        """The step that computes batches. Only the engine's thread asks: one that was handed over is taken now."""
        if self._next_step is not None:
            self.step = self._next_step
            self.on_other_step()
        return self._step

    @step.setter
    def step(self, step: Step) -> None:
        self._step, self._next_step = step, None

    def hand_over(self, step: Step) -> None:
        """Gives the engine's thread another step, from whichever thread."""
        self._next_step = step

    def launch(self, scheduled: list[ScheduledSequence], *, keep_gate_logits: bool = False) -> LaunchedStep:
        """Queues one forward over everything scheduled, sampling of tokens and predictions in one go, and the copies of
        what they bring, which the caller closes.

        Raises OutOfMemory; then nothing has changed but what the next step will write again.
        """
        with out_of_memory.told_apart():
            step = self.step
            output = step.forward(self._batches.build(scheduled), self.kv_cache)
            launched, ids = _sampled(output, scheduled, keep_gate_logits=keep_gate_logits)
        self._draft_ahead(step, output, launched, ids)
        return launched

    def _draft_ahead(self, step: Step, output: ForwardOutput, launched: LaunchedStep, ids: Tensor) -> None:
        """Queues what the draft layer makes of the step. Whatever goes wrong with it, the step is as good without."""
        try:
            drafts = draft_ahead(step, launched.scheduled, ids, output, self.kv_cache)
        except Exception:
            logger.exception("the draft layer failed: this step drafts a token at a time")
            return
        if drafts is not None:
            launched.drafting, launched.deeper = drafts[0], launched.copies.of(drafts[1])

    def collect(self, launched: LaunchedStep) -> list[SequenceResult]:
        """Waits for what has been sampled in a step. One result per scheduled sequence, in the same order."""
        return launched.collect()

    def free_memory(self) -> None:
        """Gives back what torch keeps for later, after OutOfMemory."""
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def dummy_row(self, settings: GateSettings, weight: float) -> bytes | None:
        """The gate row of the scaling pass under `settings`, times `weight`; None where it is the model's own."""
        row = self.model.classifier.dummy_row_of(settings.scaling_pass_value, settings.top_k_lora) * weight
        return None if torch.equal(row, self._dummy_row) else row.numpy().tobytes()


def _sampled(
    output: ForwardOutput, scheduled: list[ScheduledSequence], *, keep_gate_logits: bool
) -> tuple[LaunchedStep, Tensor]:
    """Samples every sequence, and queues the copies of what there is to say of the step. Returns the sampled ids as
    well, int64 [R], on the device.
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
    """logits [L, V] of `scheduled`, sequence by sequence -> those that are sampled from; the logprobs of the prompts'
    own tokens at the others.
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
    """The rows of a sequence that are sampled from: its samples, then its predictions."""
    sequence, drafts = one.sequence, one.sequence.drafts
    first = one.predict_start - len(sequence.tokens)
    rows = [SampleRow(sequence, drafts[:count]) for count in range(one.samples)]
    rows += [SampleRow(sequence, drafts[: first + count], drafted=True) for count in range(one.predict_count)]
    return rows


def _sample(logits: Tensor, rows: list[list[SampleRow]]) -> tuple[Tensor, dict[int, Failure]]:
    """logits [R, V] of the rows of each sequence -> int64 [R]; the errors of sequences, by their place in `rows`.

    Where sampling raises, every sequence is sampled alone, and one that raises again has an error. A grammar that has
    become too complex is its request's fault, and nothing to log.
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
    """fp32 [L + scaling rows]: one number per row of the logits, then of the gate logits, finite where the row is.

    -inf among logits is how some families rule out ids: their rows are judged by the largest, which NaN and infinity
    win; gate rows by the sum. `largest`, int64 [L]: where it is, if that is known, which saves reading [L, V] again.
    """
    logits = output.logits
    of_rows = logits.amax(-1) if largest is None else logits.gather(-1, largest[:, None])[:, 0]
    return torch.cat([of_rows.float(), output.gate_logits.sum((1, 2))])
