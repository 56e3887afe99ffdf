"""Nobody is served at everyone's expense: counted in steps, with the fake runner of test_scheduler.py."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.engine import Engine
from service.engine.scheduler import fair_share
from tests.engine.test_scheduler import FakeRunner, build, expected, finish, request


def steps_to_first_token(engine: Engine, name: str, limit: int = 200) -> int:
    for step in range(1, limit):
        if any(output.request_id == name and output.tokens for output in engine.step().outputs):
            return step
    raise AssertionError("no token")


def rows_by_request(runner: FakeRunner, since: int) -> list[Counter[str]]:
    """Of each step."""
    return [Counter({share.sequence.request.id: share.rows for share in plan}) for plan in runner.steps[since:]]


@pytest.mark.parametrize("joins_late", [True, False])
def test_a_long_prompt_does_not_stall_short_ones(joins_late: bool) -> None:
    """Two passes over a short prompt are two steps, whatever else is computed; the long one takes what is left."""
    engine, runner, _ = build(budget=64, blocks=2100, length=4100)
    engine.add(request("long", 4000, 2))
    if joins_late:
        for _ in range(3):
            engine.step()
    engine.add(request("short", 20, 4))
    before = len(runner.steps)
    assert steps_to_first_token(engine, "short") == 2
    for rows in rows_by_request(runner, before):
        assert (rows["short"], rows["long"]) == (20 + rows["short"] % 20, 64 - rows["short"])


def test_several_long_prompts_advance_evenly() -> None:
    """And a step is full: what one does not need the others have."""
    engine, runner, _ = build(budget=60, blocks=900, length=1100)
    for name, length in (("a", 300), ("b", 300), ("c", 7)):
        engine.add(request(name, length, 1))
    engine.step()
    assert rows_by_request(runner, 0) == [{"a": 26, "b": 26, "c": 7}]
    engine.step()
    engine.step()
    assert all(sum(rows.values()) >= 59 for rows in rows_by_request(runner, 0))
    finish(engine)
    assert len(runner.steps) <= 2 * 607 / 59 + 2


def test_a_crowd_does_not_stall_the_long_prompt() -> None:
    """It has its even share in every step, however many short ones come."""
    engine, runner, _ = build(budget=40, blocks=900, slots=8, length=1100)
    engine.add(request("long", 400, 1))
    for number in range(60):
        engine.add(request(f"short {number}", 30, 1))
        engine.add(request(f"also short {number}", 30, 1))
        engine.step()
        if number > 2:
            assert rows_by_request(runner, -1)[0]["long"] >= 40 // 8
    assert finish(engine)[("long", 0)] == expected(request("long", 400, 1))


def test_who_cannot_be_admitted_holds_no_rows_back() -> None:
    """A step is not left half empty for a request without blocks or slot."""
    for options in ({"blocks": 24}, {"slots": 1}):
        engine, runner, scheduler = build(budget=8, length=1100, **options)
        engine.add(request("first", 40, 2))
        engine.step()
        engine.add(request("next", 44, 1))
        for _ in range(4):
            engine.step()
        assert [sequence.request.id for sequence in scheduler.running] == ["first"]
        assert all(sum(rows.values()) == 8 for rows in rows_by_request(runner, 0))
        finish(engine)


def test_choices_that_wait_for_their_prompt_hold_no_rows_back() -> None:
    """16 choices compute their prompt once: they count as one prompt."""
    engine, runner, _ = build(budget=40, blocks=900, slots=32)
    engine.add(request("n", 90, 2, n=16))
    engine.add(request("other", 90, 2))
    for _ in range(4):
        engine.step()
    assert rows_by_request(runner, 0) == [{"n": 20, "other": 20}] * 4
    finish(engine)


def test_many_choices_leave_slots() -> None:
    """n = 16 on 8 slots: a short request finds one at once."""
    engine, _, scheduler = build(budget=64, blocks=900, slots=8)
    engine.add(request("n", 10, 30, n=16))
    for _ in range(6):
        engine.step()
    assert len(scheduler.running) == 6
    for number in range(3):
        engine.add(request(f"short {number}", 10, 2))
        assert steps_to_first_token(engine, f"short {number}") <= 3
    result = finish(engine)
    assert {key for key in result if key[0] == "n"} == {("n", index) for index in range(16)}


def test_further_choices_let_later_requests_pass() -> None:
    """One slot, n = 4 before 40 others: they go by priority, and the last choice comes before the last."""
    engine, _, scheduler = build(budget=64, blocks=900, slots=1)
    engine.add(request("n", 10, 1, n=4))
    for number in range(40):
        engine.add(request(f"{number}", 5, 1))
    order = [(sequence.request.id, sequence.index) for sequence in scheduler.waiting]
    assert [order.index(("n", index)) for index in range(4)] == [0, 4, 9, 14]
    assert [name for name, _ in order if name != "n"] == [str(number) for number in range(40)]
    finish(engine)


def test_choices_come_to_an_end_under_endless_load() -> None:
    """Letting others pass is bounded."""
    engine, _, _ = build(budget=64, blocks=900, slots=2)
    engine.add(request("n", 10, 3, n=8))
    ended: set[int] = set()
    for number in range(400):
        engine.add(request(f"{number}", 5, 3))
        for output in engine.step().outputs:
            if output.request_id == "n" and output.finish_reason:
                ended.add(output.index)
        if len(ended) == 8:
            return
    raise AssertionError(f"only {sorted(ended)} have ended")


def test_a_preempted_sequence_is_first_again() -> None:
    """It has said something already; a later arrival must not take its blocks."""
    engine, _runner, scheduler = build(blocks=20, block_size=2, lookahead=False)
    for name in ("early", "late"):
        engine.add(request(name, 8, 12))
    while not engine.step().stats.preemptions:
        pass
    engine.add(request("newcomer", 1, 1))
    assert [sequence.request.id for sequence in scheduler.waiting] == ["late", "newcomer"]
    while [sequence.request.id for sequence in scheduler.waiting] == ["late", "newcomer"]:
        engine.step()
    assert "late" in [sequence.request.id for sequence in scheduler.running]
    finish(engine)


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(1, 200))
def test_even_share(needs: list[int], budget: int) -> None:
    """The largest of all shares that fit, tried one by one."""
    fitting = [share for share in range(1, budget + 1) if sum(min(need, share) for need in needs) <= budget]
    assert fair_share(needs, budget) == max(fitting, default=1)
