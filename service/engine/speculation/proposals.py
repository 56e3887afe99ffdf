"""Proposes drafts for a sequence, as many as pay. Reads sequences, and changes none."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import repeat

from service.engine.sequence import Sequence
from service.engine.speculation.costs import BreakEven
from service.engine.speculation.drafters import ANY_TOKEN, NO_DRAFT, expected


def lookahead_depth(sequence: Sequence, likelihood: float, needed: BreakEven) -> int:
    """The number of lookahead drafts that pay after the present drafts, which are all right with `likelihood`."""
    count = 0
    for drafter, minimum in zip(sequence.lookahead, needed.lookahead, strict=True):
        likelihood *= drafter.record.rate
        if likelihood < minimum:
            # Beyond the first draft, a try is a run of the draft layer, which the whole step waits for.
            return count + drafter.record.is_idle(len(sequence.tokens), needed.sequences if count else 1)
        count += 1
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


def look_up(sequence: Sequence, needed: SequenceOf[float], max_tokens: int) -> tuple[int, list[int]]:
    """Proposes up to `max_tokens` prompt-lookup drafts. Returns (place, tokens), to replace drafts[place:]; no tokens
    where the text does not repeat itself, or none pay.

    Pending drafts, which have no rows yet, are replaced where more of the new ones are expected to be right; otherwise
    the new ones are appended.
    """
    drafts, ngrams, record = sequence.drafts, sequence.ngrams, sequence.prompt_lookup
    pending = sequence.pending_drafts
    computed = len(drafts) - pending
    if pending and ngrams.repeats(drafts[:computed]):
        count = _paying(record.rate, sequence.likelihood(0), needed[:max_tokens])
        others = expected(drafter.record.rate for drafter in sequence.drafters[computed:])
        if count and expected(repeat(record.rate, count)) > others:
            return computed, ngrams.continuation(drafts[:computed], count)
    if not ngrams.repeats(drafts):
        return 0, []
    count = _paying(record.rate, sequence.likelihood(0), needed[pending:max_tokens])
    if not count and max_tokens > pending and record.is_idle(len(sequence.tokens)):
        count = 1
    return len(drafts), ngrams.continuation(drafts, count) if count else []


def _paying(rate: float, likelihood: float, needed: SequenceOf[float]) -> int:
    """The number of consecutive drafts with this rate that pay, after drafts that are all right with `likelihood`."""
    count = 0
    for minimum in needed:
        likelihood *= rate
        if likelihood < minimum:
            break
        count += 1
    return count
