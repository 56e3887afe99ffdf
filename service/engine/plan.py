"""The plan of a step: the rows of each sequence. Made by the scheduler, read by the runner and the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.sequence import Sequence

_NONE = range(0)


@dataclass(slots=True)
class ScheduledSequence:
    """The rows of one sequence in a step: positions start .. start + count of either stream."""

    sequence: Sequence
    scaling_start: int
    scaling_count: int
    real_start: int
    real_count: int
    samples: int  # real rows, the last ones, whose logits are sampled: from the last accepted position on
    predict_start: int  # the first position whose token the scaling pass predicts: from the row before it
    expected: list[int]  # for each predicted position, the token that the prediction is compared with (proposals.py)
    draft_depth: int = 0  # tokens to draft from the first prediction that differs on; beyond 1 by the draft layer
    scores: range = _NONE  # prompt positions whose real rows give the logprob of the prompt's next token
    # First rows in the flat batch and in the logits (`samples`, then `predict_count`, then `scores`); set by the
    # batch builder.
    scaling_row: int = 0
    real_row: int = 0
    logit_row: int = 0

    @property
    def scaling_end(self) -> int:
        """The position after the last scaling row."""
        return self.scaling_start + self.scaling_count

    @property
    def real_end(self) -> int:
        """The position after the last real row."""
        return self.real_start + self.real_count

    @property
    def predict_count(self) -> int:
        """Predicted positions."""
        return len(self.expected)

    @property
    def rows(self) -> int:
        """Rows in the flat batch."""
        return self.scaling_count + self.real_count

    @property
    def logit_count(self) -> int:
        """Rows in the logits."""
        return self.samples + self.predict_count + len(self.scores)


@dataclass(slots=True)
class Plan:
    """The rows of one step, of all sequences."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    rows: int = 0  # of the flat batch
    preemptions: int = 0
