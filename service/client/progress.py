"""Whether the engine gets on. Knows when it made its last step, and how long an honest one may take; no sockets.

The engine's process does one thing at a time: while it computes a step it answers nothing. So a step that is merely
long looks like one that never ends, and only time tells them apart.
"""

from __future__ import annotations

from service.contract.output import StepStats

_FULL_STEPS = 3.0  # of the best speed seen: attention over long texts, and neighbours on the machine, make steps longer
_MIN_ROWS = 8  # a step of fewer is no measure of speed: it takes as long as reading the weights does


class Progress:
    """Steps as they come; times are those of the event loop, in seconds."""

    def __init__(self, stall_seconds: float) -> None:
        self.max_step_rows = 0  # of the engine; 0: not known yet
        self._stall_seconds = stall_seconds
        self._row_seconds = 0.0  # the best that a step of many rows took for one of them; 0: there was none
        self._at = 0.0  # when the engine got on last, or was given work while it had none

    def mark(self, now: float) -> None:
        """The engine has got on, or could not before now."""
        self._at = now

    def stepped(self, now: float, stats: StepStats) -> None:
        """A report of the engine; without rows it was no step."""
        rows = stats.scaling_rows + stats.real_rows
        if rows:
            self._at = now
        if rows >= _MIN_ROWS and stats.step_seconds > 0:
            seconds = stats.step_seconds / rows
            self._row_seconds = min(self._row_seconds or seconds, seconds)

    @property
    def limit_seconds(self) -> float:
        """How long the engine may be silent: the setting, or three full steps where those take longer."""
        return max(self._stall_seconds, _FULL_STEPS * self.max_step_rows * self._row_seconds)

    def stalled(self, now: float, *, has_work: bool, asked_at: float | None) -> bool:
        """Whether too much time has passed with work and without a step, or since an unanswered question."""
        since = [self._at] if has_work else []
        if asked_at is not None:
            since.append(asked_at)
        return bool(since) and now - min(since) > self.limit_seconds
