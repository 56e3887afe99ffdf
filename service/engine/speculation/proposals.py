"""Proposes drafts for a sequence, as many as pay. Reads sequences, and changes none."""

from __future__ import annotations

from itertools import repeat

from service.engine.sequence import Sequence
from service.engine.speculation.drafters import ANY_TOKEN, NO_DRAFT, BreakEven, expected, paying


def lookahead_depth(sequence: Sequence, likelihood: float, needed: BreakEven) -> int:
    """The number of lookahead drafts that pay after the present drafts, which are all right with `likelihood`."""
    count, minimum = 0, needed.one_row
    for drafter in sequence.lookahead:
        likelihood *= drafter.record.rate
        if likelihood < minimum:
            return count + drafter.record.is_idle(len(sequence.tokens))
        count, minimum = count + 1, needed.layer
    return count


def expected_prediction(sequence: Sequence, place: int) -> int:
    """The token that the scaling pass's prediction for drafts[place] is compared with; `place` is an index into drafts.

    The first prediction that differs replaces its draft, because it has seen more tokens. NO_DRAFT always differs;
    ANY_TOKEN, for a prompt-lookup draft with the better acceptance rate, never does.
    """
    if place >= len(sequence.drafts):
        return NO_DRAFT
    drafter = sequence.drafters[place]
    if drafter.is_lookup and drafter.record.rate > sequence.lookahead[0].record.rate:
        return ANY_TOKEN
    return sequence.drafts[place]


def look_up(sequence: Sequence, needed: float, max_tokens: int) -> tuple[int, list[int]]:
    """Proposes up to `max_tokens` prompt-lookup drafts. Returns (place, tokens), to replace drafts[place:]; no tokens
    where the text does not repeat itself, or none pay.

    Pending drafts, which have no rows yet, are replaced where more of the new ones are expected to be right; otherwise
    the new ones are appended.
    """
    drafts, ngrams, record = sequence.drafts, sequence.ngrams, sequence.prompt_lookup
    pending = sequence.pending_drafts
    computed = len(drafts) - pending
    if pending and ngrams.repeats(drafts[:computed]):
        count = paying(repeat(record.rate, max_tokens), sequence.likelihood(0), repeat(needed))
        others = expected(drafter.record.rate for drafter in sequence.drafters[computed:])
        if count and expected(repeat(record.rate, count)) > others:
            return computed, ngrams.continuation(drafts[:computed], count)
    if not ngrams.repeats(drafts):
        return 0, []
    count = paying(repeat(record.rate, max_tokens - pending), sequence.likelihood(0), repeat(needed))
    if not count and max_tokens > pending and record.is_idle(len(sequence.tokens)):
        count = 1
    return len(drafts), ngrams.continuation(drafts, count) if count else []
