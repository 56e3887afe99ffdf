"""Builds the contract's outputs from a step's results, and counts usage and drafts."""

from __future__ import annotations

from collections.abc import Mapping

from service.contract.output import Failure, SequenceOutput, StepStats, TokenOutput
from service.engine.launched_step import SequenceResult
from service.engine.plan import ScheduledSequence
from service.engine.sequence import Sequence


def output_of(
    result: SequenceResult, logprobs: Mapping[int, TokenOutput], scores: Mapping[int, list[TokenOutput]]
) -> SequenceOutput:
    """The output of one result, without its gate rows, which the caller adds."""
    sequence = result.scheduled.sequence
    if result.error is not None:
        return failed(sequence, result.error)
    if logprobs:
        tokens = [logprobs.get(row) or TokenOutput(id) for row, id in enumerate(result.tokens, result.token_row)]
    else:
        tokens = [TokenOutput(id) for id in result.tokens]
    return SequenceOutput(
        sequence.request.id,
        sequence.index,
        tokens,
        prompt_logprobs=scores.get(id(result.scheduled), []) if result.finite else [],
        finish_reason=result.finish_reason,
        usage=sequence.usage,
    )


def failed(sequence: Sequence, failure: Failure) -> SequenceOutput:
    """The last output of a sequence that ends with a failure."""
    return SequenceOutput(
        sequence.request.id,
        sequence.index,
        finish_reason="error",
        usage=sequence.usage,
        error=failure.message,
        error_param=failure.param,
    )


def count_step(scheduled: ScheduledSequence, stats: StepStats) -> None:
    """Adds one sequence's step to its usage. Moves its draft outcomes to usage and statistics."""
    sequence, usage = scheduled.sequence, scheduled.sequence.usage
    usage.forward_passes += 1
    usage.scaling_rows += scheduled.scaling_count
    usage.real_rows += scheduled.real_count
    for drafter, kept in sequence.draft_outcomes:
        for counts in (usage.drafts, stats.drafts):
            counts.count(drafter.depth, is_lookup=drafter.is_lookup, kept=kept)
    sequence.draft_outcomes.clear()
