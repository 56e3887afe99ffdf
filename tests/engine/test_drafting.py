"""Which drafts are made: the arithmetic of what pays, and the n-gram index against a plain search."""

from __future__ import annotations

from itertools import accumulate, pairwise
from operator import mul

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.contract.request import Request, SamplingParams
from service.engine.sequence import Sequence
from service.engine.speculation.costs import BreakEven, StepCost
from service.engine.speculation.drafters import Record
from service.engine.speculation.prompt_lookup import NgramIndex
from service.engine.speculation.proposals import expected_prediction, look_up, lookahead_depth

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


def test_seconds_of_a_step() -> None:
    """Between what was measured, before it and beyond."""
    cost = StepCost(((2, 3.0), (4, 3.5), (8, 9.5)))
    assert [cost.seconds(rows) for rows in (0, 2, 3, 4, 6, 8, 10)] == [2.5, 3.0, 3.25, 3.5, 6.5, 9.5, 12.5]


@pytest.mark.parametrize(("row", "sequences"), [(0.065, 1), (0.065, 16), (0.007, 128)])
def test_break_even_of_one_draft(row: float, sequences: int) -> None:
    """A kept draft saves a step's fixed cost, shared by its sequences; a dropped one costs its row."""
    [p] = BreakEven.of(StepCost.linear(row), sequences, [0.9], 1).lookahead
    assert p * 1.0 / sequences == pytest.approx((1 - p) * row)
    assert BreakEven.of(StepCost(), sequences, [0.9, 0.8], 2) == BreakEven(
        [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], sequences
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0.3, 1.0), min_size=1, max_size=6),
    st.lists(st.floats(0.0, 2.0), min_size=4, max_size=4),
    st.floats(0.0, 0.5),
    st.integers(1, 20),
)
def test_break_even_finds_the_best_depth(rates: list[float], more: list[float], layer: float, sequences: int) -> None:
    """Where each draft costs more than the one before, drafting on while it pays brings the most tokens a second."""
    rising = sorted(more)
    points = [(0, 1.0), *zip((2, 8, 16, 240), accumulate(rising, initial=1.0), strict=False)]
    cost = StepCost(tuple((rows, seconds) for rows, seconds in points), layer)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(cost.points)]
    assume(slopes == sorted(slopes))
    needed = BreakEven.of(cost, sequences, rates, 1)
    likelihood, pays = 1.0, 0
    for rate, least in zip(rates, needed.lookahead, strict=True):
        likelihood *= rate
        if pays and likelihood < least - 1e-9:
            break
        pays += 1
    brought = list(accumulate(accumulate(rates, mul)))

    def tokens_per_second(depth: int) -> float:
        return brought[depth - 1] / (cost.seconds(2 * depth * sequences) + (depth - 1) * layer)

    assert tokens_per_second(pays) == pytest.approx(max(map(tokens_per_second, range(1, len(rates) + 1))), rel=1e-6)


def test_how_deep_it_pays_to_look_ahead() -> None:
    """The first draft costs less than those behind it, which have to be right together."""
    sequence = drafting()
    set_rates(sequence, [0.9, 0.8, 0.9])
    free, dear = BreakEven([0.0] * 3, [], []), BreakEven([0.5, 0.7, 0.7], [], [])
    assert [lookahead_depth(sequence, likelihood, free) for likelihood in (1.0, 0.1)] == [3, 3]
    assert [lookahead_depth(sequence, likelihood, dear) for likelihood in (1.0, 0.7, 0.5)] == [2, 1, 0]


def test_a_drafter_that_gave_up_tries_again() -> None:
    """A text may become predictable: after 32 tokens one more draft is tried, and only one."""
    sequence = drafting()
    set_rates(sequence, [0.0, 1.0])
    needed, depths = BreakEven([0.1, 0.1], [], []), []
    for token in range(40):
        depths.append(lookahead_depth(sequence, 1.0, needed))
        sequence.accept(token)
    assert depths == [0] * 32 + [1] * 8
    sequence.draft([9], sequence.lookahead)
    assert lookahead_depth(sequence, 1.0, needed) == 0


def set_rates(sequence: Sequence, rates: list[float]) -> None:
    """With nothing drafted so far."""
    used_at = sequence.prompt_len
    sequence.set_records([Record(rate, used_at) for rate in rates], sequence.prompt_lookup)


def test_a_sequence_begins_as_others_have_fared() -> None:
    """What has seldom been right is expected to be so in the next sequence, but is not given up before it was tried."""
    of_all = Record(0.9)
    first = of_all.begin(3)
    assert (first.rate, first.used_at) == (0.9, 3)
    for _ in range(40):
        first.update(False)
    assert first.rate < 0.01
    assert 0.3 < of_all.rate < 0.6
    assert of_all.begin(5).rate == of_all.rate
    for _ in range(400):
        first.update(False)
    assert 0.2 < of_all.begin(5).rate < 0.4


def drafting(*drafts: int, computed: int = 0) -> Sequence:
    """[1, 2, 3] and looked-up drafts, `computed` positions of which have scaling rows."""
    sequence = Sequence.of(Request("a", [1, 2, 3], SamplingParams(max_tokens=200)), 0, 0.0)
    sequence.take_lookup(0, list(drafts))
    sequence.scaling.computed, sequence.real.computed = computed, 3
    return sequence


def outcomes(sequence: Sequence) -> list[tuple[int, bool]]:
    """The depths of drafts that had rows, and whether they were kept."""
    return [(drafter.depth, kept) for drafter, kept in sequence.draft_outcomes]


def test_a_wrong_draft_takes_all_behind_it_along() -> None:
    """Right drafts stay computed; from the first wrong one on, both streams go back to the accepted tokens."""
    sequence = drafting(4, 5, 6, 7, computed=6)
    sequence.real.computed = 5
    assert sequence.accept(4)
    assert (sequence.tokens, sequence.drafts) == ([1, 2, 3, 4], [5, 6, 7])
    assert (sequence.scaling.computed, sequence.real.computed) == (6, 5)
    assert not sequence.accept(9)
    assert (sequence.tokens, sequence.drafts, sequence.drafters) == ([1, 2, 3, 4, 9], [], [])
    assert (sequence.scaling.computed, sequence.real.computed) == (4, 4)
    assert outcomes(sequence) == [(1, True), (2, False), (3, False)], "the draft 7 had cost nothing yet"


def predict(sequence: Sequence, start: int, predictions: list[int], deeper: list[int]) -> None:
    """As the scheduler and the engine have it."""
    places = range(start - 3, start - 3 + len(predictions))
    sequence.predict(start, predictions, [expected_prediction(sequence, place) for place in places], deeper)


def test_predictions_check_drafts() -> None:
    """The scaling pass's word counts against a looked-up draft while its record is the better one, and against a draft
    from further back always; what it agrees with stays. What follows the first that differs comes from there.
    """
    for lookup, ahead, drafts, computed in ((0.5, 0.8, [4, 5, 8, 1, 2], 5), (0.9, 0.8, [4, 5, 6, 9, 1, 2], 6)):
        sequence = drafting(4, 5, 6, computed=6)
        set_rates(sequence, [ahead] * 3)
        sequence.prompt_lookup.rate = lookup
        predict(sequence, 4, [5, 8, 9], [1, 2])
        assert (sequence.drafts, sequence.scaling.computed) == (drafts, computed)
        assert sequence.drafters[-3:] == sequence.lookahead
    sequence = drafting(computed=6)
    set_rates(sequence, [0.1, 0.9, 0.9])
    sequence.draft([4, 5, 6], sequence.lookahead)
    predict(sequence, 4, [5, 8, 9], [1])
    assert (sequence.drafts, sequence.scaling.computed) == ([4, 5, 8, 1], 5)
    sequence = drafting(4, 5, 6, computed=6)
    predict(sequence, 4, [5, 6], [])
    assert sequence.drafts == [4, 5, 6]


def test_a_lookup_takes_the_place_of_doubtful_drafts() -> None:
    """Where the text repeats itself and look-ups have been right, they replace drafts that have no rows yet."""
    sequence = Sequence.of(Request("a", [1, 2, 3, 4, 5, 6, 1, 2], SamplingParams(max_tokens=200)), 0, 0.0)
    set_rates(sequence, [0.5, 0.5])
    sequence.draft([3, 9], sequence.lookahead)
    sequence.scaling.computed = 9
    sequence.prompt_lookup.rate = 0.9
    assert look_up(sequence, [0.1] * 3, 3) == (1, [4, 5, 6])
    sequence.take_lookup(1, [4, 5, 6])
    assert sequence.drafts == [3, 4, 5, 6]
    assert not sequence.draft_outcomes
    sequence.prompt_lookup.rate = 0.2
    sequence.draft([7], sequence.lookahead)
    assert look_up(sequence, [0.5] * 8, 8)[1] == []


def test_an_end_amid_right_drafts_leaves_no_row_too_many() -> None:
    """The rows of drafts behind a stop token were right, but nothing they said was accepted: they are not reported."""
    sequence = drafting(4, 5, 6, computed=6)
    sequence.real.computed = 6
    assert sequence.accept(4)
    sequence.give_up_drafts()
    assert sequence.final == 3
    assert (sequence.scaling.computed, sequence.real.computed, sequence.drafts) == (4, 4, [])
    assert outcomes(sequence) == [(1, True), (2, False), (3, False)]
