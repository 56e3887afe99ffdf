"""What a sequence may draft next, and how much of it pays. It looks at sequences, and changes none."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import repeat

from service.engine.sequence import Sequence
from service.engine.speculation.costs import BreakEven
from service.engine.speculation.drafters import ANY_TOKEN, NO_DRAFT, expected


def lookahead_depth(sequence: Sequence, likelihood: float, needed: BreakEven) -> int:
    """How many drafts of the scaling pass pay after the drafts there are, which are right with `likelihood`."""
    count = 0
    for drafter, least in zip(sequence.lookahead, needed.lookahead, strict=True):
        likelihood *= drafter.record.rate
        if likelihood < least:
            return count + drafter.record.is_idle(len(sequence.tokens))
        count += 1
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


def look_up(sequence: Sequence, needed: SequenceOf[float], most: int) -> tuple[int, list[int]]:
    """Up to `most` drafts from earlier text, to follow drafts[:place]: those that have rows, where these are expected
    to bring more than the others, else all. Returns place and tokens; none where nothing repeats or pays.
    """
    drafts, ngrams, record = sequence.drafts, sequence.ngrams, sequence.prompt_lookup
    pending = sequence.pending_drafts
    computed = len(drafts) - pending
    if pending and ngrams.repeats(drafts[:computed]):
        count = _paying(record.rate, sequence.likelihood(0), needed[:most])
        others = expected(drafter.record.rate for drafter in sequence.drafters[computed:])
        if count and expected(repeat(record.rate, count)) > others:
            return computed, ngrams.continuation(drafts[:computed], count)
    if not ngrams.repeats(drafts):
        return 0, []
    count = _paying(record.rate, sequence.likelihood(0), needed[pending:most])
    if not count and most > pending and record.is_idle(len(sequence.tokens)):
        count = 1
    return len(drafts), ngrams.continuation(drafts, count) if count else []


def _paying(rate: float, likelihood: float, needed: SequenceOf[float]) -> int:
    """How many drafts of this rate pay, one after another, after drafts that are right with `likelihood`."""
    count = 0
    for least in needed:
        likelihood *= rate
        if likelihood < least:
            break
        count += 1
    return count
