"""What a sequence may draft next, and how much of it pays. It looks at sequences, and changes none."""

from __future__ import annotations

from itertools import repeat

from service.engine.sequence import Sequence
from service.engine.speculation.drafters import ANY_TOKEN, NO_DRAFT, BreakEven, expected, paying


def lookahead_depth(sequence: Sequence, likelihood: float, needed: BreakEven) -> int:
    """How many drafts of the scaling pass pay after the drafts there are, which are right with `likelihood`."""
    count, least = 0, needed.one_row
    for drafter in sequence.lookahead:
        likelihood *= drafter.record.rate
        if likelihood < least:
            return count + drafter.record.is_idle(len(sequence.tokens))
        count, least = count + 1, needed.layer
    return count


def expected_prediction(sequence: Sequence, place: int) -> int:
    """What the scaling pass's prediction of drafts[place] is compared with: the first that differs is a draft in its
    place, for a look from nearer knows more. A looked-up draft with the better record stands.
    """
    if place >= len(sequence.drafts):
        return NO_DRAFT
    drafter = sequence.drafters[place]
    if drafter.is_lookup and drafter.record.rate > sequence.lookahead[0].record.rate:
        return ANY_TOKEN
    return sequence.drafts[place]


def look_up(sequence: Sequence, needed: float, most: int) -> tuple[int, list[int]]:
    """Up to `most` drafts from earlier text, to follow drafts[:place]: those that have rows, where these are expected
    to bring more than the others, else all. Returns place and tokens; none where nothing repeats or pays.
    """
    drafts, ngrams, record = sequence.drafts, sequence.ngrams, sequence.prompt_lookup
    pending = sequence.pending_drafts
    computed = len(drafts) - pending
    if pending and ngrams.repeats(drafts[:computed]):
        count = paying(repeat(record.rate, most), sequence.likelihood(0), repeat(needed))
        others = expected(drafter.record.rate for drafter in sequence.drafters[computed:])
        if count and expected(repeat(record.rate, count)) > others:
            return computed, ngrams.continuation(drafts[:computed], count)
    if not ngrams.repeats(drafts):
        return 0, []
    count = paying(repeat(record.rate, most - pending), sequence.likelihood(0), repeat(needed))
    if not count and most > pending and record.is_idle(len(sequence.tokens)):
        count = 1
    return len(drafts), ngrams.continuation(drafts, count) if count else []
