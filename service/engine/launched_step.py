"""A step on the device, and its results.

launched   forward, sampling and every copy to the host are queued; the host is free for other work
collected  the copies have arrived: the one wait for the device in a step
written    tokens, logprobs, gate rows and the log have become outputs (engine.py)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
from torch import Tensor

from service.contract.output import Failure, FinishReason, TokenOutput
from service.engine.logprobs import Logprobs
from service.engine.plan import ScheduledSequence
from service.model.transfer import HostCopies


@dataclass(slots=True)
class SequenceResult:
    """The result of one step for one scheduled sequence: first as the device computed it, then, after the engine has
    verified drafts, with accepted tokens only and the finish reason.
    """

    scheduled: ScheduledSequence
    tokens: list[int] = field(default_factory=list)  # sampled from the real rows, first position first
    predictions: list[int] = field(default_factory=list)  # sampled from the scaling rows
    token_row: int = 0  # of its first token among the step's sampled rows
    deeper: list[int] = field(default_factory=list)  # drafts of the draft layer, behind the first unexpected prediction
    finite: bool = True  # False: its logits or gate rows have NaN or infinity
    error: Failure | None = None  # why the sequence cannot go on; it has nothing else then
    finish_reason: FinishReason | None = None
    final: int = 0  # positions of the sequence that were final after this step


@dataclass(slots=True)
class LaunchedStep:
    """The pending outputs of one launch. R sampled rows: of each sequence its samples, then its predictions."""

    scheduled: list[ScheduledSequence]
    copies: HostCopies  # brings the tensors below that are marked "copied"
    ids: Tensor  # int64 [R], copied
    marks: Tensor  # fp32 [L + scaling rows], copied: a number per row of logits and gate logits, finite if the row is
    scalings: Tensor  # [scaling rows, S, E] on the device; valid after the next launch if a sequence does not generate
    logit_rows: int  # L
    errors: dict[int, Failure] = field(default_factory=dict)  # by index in `scheduled`; their ids mean nothing
    logprobs: Logprobs | None = None  # of the sampled rows `logprob_rows`
    logprob_rows: list[int] = field(default_factory=list)
    scores: Logprobs | None = None  # of the prompts' own tokens, sequence by sequence
    gate_logits: Tensor | None = None  # fp32 [scaling rows, S, E], copied, while the scalings log is on
    drafting: list[ScheduledSequence] = field(default_factory=list)  # those that the draft layer ran for
    deeper: Tensor | None = None  # int64 [drafting, depth - 1], copied: its drafts

    def collect(self) -> list[SequenceResult]:
        """Waits for the copies. One result per scheduled sequence, in the same order."""
        self.copies.wait()
        finite = np.isfinite(self.marks.numpy())
        all_finite = bool(finite.all())
        sampled, row = self.ids.tolist(), 0
        results: list[SequenceResult] = []
        for number, one in enumerate(self.scheduled):
            middle = row + one.samples
            end = middle + one.predict_count
            if number in self.errors:
                result = SequenceResult(one, error=self.errors[number])
            else:
                result = SequenceResult(one, sampled[row:middle], sampled[middle:end], row)
            if not all_finite:
                result.finite = self._is_finite(one, finite)
            results.append(result)
            row = end
        if self.deeper is not None:
            drafted = {id(one): tokens for one, tokens in zip(self.drafting, self.deeper.tolist(), strict=True)}
            for result in results:
                result.deeper = drafted.get(id(result.scheduled), [])[: max(0, result.scheduled.draft_depth - 1)]
        return results

    def _is_finite(self, one: ScheduledSequence, finite: npt.NDArray[np.bool_]) -> bool:
        """Whether a sequence's gate rows and the logits that it is sampled or scored by are finite. Logits that only
        predict drafts do not count.
        """
        predicted = one.logit_row + one.samples
        first_gate_row = self.logit_rows + one.scaling_row
        return bool(
            finite[one.logit_row : predicted].all()
            and finite[predicted + one.predict_count : one.logit_row + one.logit_count].all()
            and finite[first_gate_row : first_gate_row + one.scaling_count].all()
        )

    def read_logprobs(self) -> dict[int, TokenOutput]:
        """Tokens with logprobs, by sampled row, of the rows whose requests return them."""
        if self.logprobs is None:
            return {}
        return dict(zip(self.logprob_rows, self.logprobs.read(), strict=True))

    def read_scores(self) -> dict[int, list[TokenOutput]]:
        """Prompt tokens with logprobs, by the id() of their ScheduledSequence, of the positions scored in this step."""
        if self.scores is None:
            return {}
        scores = iter(self.scores.read())
        return {id(one): list(islice(scores, len(one.scores))) for one in self.scheduled}

    def read_gate_logits(self, one: ScheduledSequence) -> npt.NDArray[np.float32] | None:
        """The gate logits [scaling_count, S, E] of a scheduled sequence; None where they are not kept."""
        if self.gate_logits is None:
            return None
        return self.gate_logits.numpy()[one.scaling_row : one.scaling_row + one.scaling_count]
