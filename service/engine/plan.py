"""The plan of a step: which rows of which sequences run. The scheduler makes it, the runner and the engine read it."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.sequence import Sequence

_NONE = range(0)


@dataclass(slots=True)
class ScheduledSequence:
    """What one sequence runs in a step: positions start .. start + count of either stream."""

    sequence: Sequence
    scaling_start: int
    scaling_count: int
    real_start: int
    real_count: int
    samples: int  # the last so many real rows, from the last accepted position on: their logits give the next tokens
    predict_start: int  # the logits of the scaling rows before positions predict_start ... predict those
    expected: list[int]  # ... as many, and with what each prediction is compared (proposals.py)
    draft_depth: int = 0  # tokens to draft in the place of the first that differs; beyond 1 by the draft layer
    scores: range = _NONE  # prompt positions whose real rows' logits give the logprob of the prompt's next token
    # Where its rows are, once the batch is built: in the flat batch, and in the logits (`samples`, then
    # `predict_count`, then `scores`).
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
        """Scaling rows whose logits predict."""
        return len(self.expected)

    @property
    def rows(self) -> int:
        """Rows of the flat batch."""
        return self.scaling_count + self.real_count

    @property
    def logit_count(self) -> int:
        """Rows of the logits."""
        return self.samples + self.predict_count + len(self.scores)


@dataclass(slots=True)
class Plan:
    """One step."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    rows: int = 0  # of the flat batch
    preemptions: int = 0
