"""When an engine counts as stalled: times are given, nothing waits."""

from __future__ import annotations

import pytest

from service.client.progress import Progress
from service.contract.output import StepStats


def progress(stall_seconds: float = 10.0) -> Progress:
    made = Progress(stall_seconds)
    made.max_step_rows = 256
    made.mark(100.0)
    return made


def test_work_without_a_step_and_a_question_without_an_answer_stall() -> None:
    watched = progress()
    for has_work, asked_at in ((True, None), (False, 100.0), (True, 109.0)):
        assert not watched.stalled(110.0, has_work=has_work, asked_at=asked_at)
        assert watched.stalled(110.1, has_work=has_work, asked_at=asked_at)
    assert not watched.stalled(1e6, has_work=False, asked_at=None), "idle"


def test_a_report_without_rows_is_no_progress() -> None:
    """An engine that turns in circles answers every question."""
    watched = progress()
    watched.stepped(109.0, StepStats(requests_running=3))
    assert watched.stalled(110.5, has_work=True, asked_at=None)
    watched.stepped(110.5, StepStats(step_seconds=0.1, real_rows=1))
    assert not watched.stalled(120.0, has_work=True, asked_at=None)


@pytest.mark.parametrize(
    ("steps", "limit"),
    [
        ([(0.004, 16)], 10.0),  # small models: the setting
        ([(1.0, 16)], 48.0),  # a 7B model on two cores, as its warm-up says: three steps of 256 rows
        ([(1.0, 16), (9.6, 256), (2.0, 16)], 28.8),  # the best speed counts
        ([(3.0, 1), (9.0, 7)], 10.0),  # steps of few rows say nothing of large ones
        ([(0.0, 0)], 10.0),
    ],
)
def test_a_slow_model_has_the_time_of_three_full_steps(steps: list[tuple[float, int]], limit: float) -> None:
    watched = progress()
    for seconds, rows in steps:
        watched.stepped(100.0, StepStats(step_seconds=seconds, scaling_rows=rows // 2, real_rows=rows - rows // 2))
    assert watched.limit_seconds == pytest.approx(limit)
