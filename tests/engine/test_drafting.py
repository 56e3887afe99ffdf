"""Which drafts are made: the arithmetic of what pays, and the n-gram index against a plain search."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.request import Request, SamplingParams
from service.engine.drafting import Drafter, NgramIndex, break_even
from service.engine.sequence import Sequence

texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def naive(tokens: list[int], drafts: list[int], count: int) -> list[int]:
    """The latest earlier place where the last 4, 3 or 2 tokens occur and something accepted follows."""
    text = tokens + drafts
    for size in (4, 3, 2):
        if len(text) < size:
            continue
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == text[-size:]:
                for source in range(end, end + count):
                    text.append(text[source])
                return text[len(tokens) + len(drafts) :]
    return []


@settings(max_examples=300, deadline=None, derandomize=True)
@given(texts, st.lists(st.tuples(texts, st.lists(st.integers(0, 2), max_size=5), st.integers(1, 9)), max_size=5))
def test_index_equals_a_plain_search(start: list[int], growth: list[tuple[list[int], list[int], int]]) -> None:
    """A text that grows between look-ups, with drafts after it: n-grams indexed twice, missed, or matched with
    themselves.
    """
    tokens = list(start)
    index = NgramIndex(tokens)
    for more, drafts, count in growth:
        assert index.continuation(drafts, count) == naive(tokens, drafts, count)
        tokens += more
        assert index.continuation([], count) == naive(tokens, [], count)


def test_a_loop_is_continued_beyond_its_end() -> None:
    """A text that repeats itself gets as many drafts as are asked for, not only what is left of the first round."""
    assert NgramIndex([7, 1, 2, 3, 1, 2]).continuation([], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert NgramIndex([7, 1, 2, 3, 9, 1]).continuation([2], 3) == [3, 9, 1]
    assert NgramIndex([5, 6, 7]).continuation([], 4) == []
    assert NgramIndex([5]).continuation([], 4) == []


@pytest.mark.parametrize(
    ("row_cost", "sequences", "rows"), [(0.065, 1, 1), (0.065, 16, 2), (0.007, 128, 1), (0.3, 4, 1)]
)
def test_break_even_is_where_gain_equals_cost(row_cost: float, sequences: int, rows: int) -> None:
    """A kept draft saves a step's fixed cost, shared by its sequences; a dropped one costs its rows."""
    p = break_even(row_cost, sequences, rows)
    assert p * 1.0 / sequences == pytest.approx((1 - p) * row_cost * rows)
    assert break_even(0.0, sequences, rows) == 0


def test_how_many_drafts_pay() -> None:
    """Each further draft needs all before it; a bad record, or doubtful drafts, stops them."""
    drafter = Drafter(0.8)
    assert [drafter.length(1.0, needed, 8) for needed in (0.0, 0.2, 0.6, 0.79, 0.81)] == [8, 7, 2, 1, 0]
    assert drafter.length(0.5, 0.3, 8) == 2
    assert drafter.length(1.0, 0.0, 3) == 3
    for _ in range(60):
        drafter.judge(False)
    assert drafter.length(1.0, 0.01, 8) == 0
    for _ in range(8):
        drafter.judge(True)
    assert drafter.length(1.0, 0.3, 8) > 0


def test_a_drafter_that_gave_up_tries_again() -> None:
    """A text may become predictable: after 32 tokens one draft is tried, and only one."""
    sequence = Sequence.of(Request("a", [1, 2, 3], SamplingParams(max_tokens=200)), 0, 0.0)
    drafter = sequence.lookahead
    drafter.rate = 0.0
    lengths = []
    for token in range(40):
        lengths.append(drafter.length(1.0, 0.1, 5))
        sequence.accept(token)
    assert lengths == [0] * 32 + [1] * 8
    sequence.draft([9], drafter)
    assert drafter.length(1.0, 0.1, 5) == 0
    assert drafter.length(1.0, 0.1, 0) == 0


def hypothesis_of(*drafts: int, computed: int = 0) -> Sequence:
    """[1, 2, 3] and copied drafts, `computed` positions of which have scaling rows."""
    sequence = Sequence.of(Request("a", [1, 2, 3], SamplingParams(max_tokens=20)), 0, 0.0)
    sequence.draft(list(drafts), sequence.prompt_lookup)
    sequence.scaling.computed, sequence.real.computed = computed, 3
    return sequence


def test_a_wrong_draft_takes_all_behind_it_along() -> None:
    """Right drafts stay computed; from the first wrong one on, both streams go back to the accepted tokens."""
    sequence = hypothesis_of(4, 5, 6, 7, computed=6)
    sequence.real.computed = 5
    assert sequence.accept(4)
    assert (sequence.tokens, sequence.drafts) == ([1, 2, 3, 4], [5, 6, 7])
    assert (sequence.scaling.computed, sequence.real.computed) == (6, 5)
    assert not sequence.accept(9)
    assert (sequence.tokens, sequence.drafts, sequence.drafters) == ([1, 2, 3, 4, 9], [], [])
    assert (sequence.scaling.computed, sequence.real.computed) == (4, 4)
    assert (sequence.prompt_lookup.kept, sequence.prompt_lookup.dropped) == (1, 2), "the draft 7 had cost nothing yet"


def test_predictions_check_copied_drafts() -> None:
    """The scaling pass's word counts while its record is the better one; what it agrees with stays."""
    for rates, drafts, computed in (((0.5, 0.8), [4, 5, 8], 5), ((0.9, 0.8), [4, 5, 6, 9], 6)):
        sequence = hypothesis_of(4, 5, 6, computed=6)
        sequence.prompt_lookup.rate, sequence.lookahead.rate = rates
        sequence.predict(4, [5, 8, 9])
        assert (sequence.drafts, sequence.scaling.computed) == (drafts, computed)
        assert sequence.drafters[-1] is sequence.lookahead
    sequence = hypothesis_of(4, 5, 6, computed=6)
    sequence.predict(4, [5, 6])
    assert sequence.drafts == [4, 5, 6]


def test_an_end_amid_right_drafts_leaves_no_row_too_many() -> None:
    """The rows of drafts behind a stop token were right, but nothing they said was accepted: they are not reported."""
    sequence = hypothesis_of(4, 5, 6, computed=6)
    sequence.real.computed = 6
    assert sequence.accept(4)
    sequence.give_up_drafts()
    assert sequence.final == 3
    assert (sequence.scaling.computed, sequence.real.computed, sequence.drafts) == (4, 4, [])
    assert sequence.prompt_lookup.dropped == 2
