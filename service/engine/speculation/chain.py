"""Drafts beyond the scaling pass's own: where the draft layer starts for each sequence, and how its tokens are chosen.

The scaling pass has just predicted tokens that are on the device. For each sequence the first prediction that differs
from what was expected is a draft, and the draft layer goes on from its row. Which row that is, is found on the device,
so the host waits for nothing; Sequence.predict finds the same again.

A draft is chosen as its token will be, with the noise of its position, under the processors of the text that is known:
tokens that were drafted a moment ago count for no penalty, and a grammar cuts off what it does not allow later.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.engine.noise import mixed_keys
from service.engine.plan import ScheduledSequence
from service.engine.sampler import Processors, SampleRow
from service.engine.speculation.drafters import ANY_TOKEN, NO_DRAFT
from service.model.batch import AttentionGroup, DraftStart
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step
from service.model.transfer import pack_to_device


@dataclass(slots=True)
class Frontier:
    """Where each of n sequences drafts on. C: the most predictions that one of them has."""

    scheduled: list[ScheduledSequence]
    depth: int  # tokens drafted in all by the one that drafts most
    width: int  # C
    first: Tensor  # int64 [n], the number of the first prediction that differs
    tokens: Tensor  # int64 [n], that prediction
    rows: Tensor  # int64 [n], its scaling row in the flat batch
    group: AttentionGroup


def find_frontier(scheduled: SequenceOf[ScheduledSequence], ids: Tensor, kv_cache: KVCache) -> Frontier | None:
    """The frontier of the sequences that want more drafts than one, None where nobody does. `ids` int64 [R] are the
    step's sampled rows: each sequence's samples, then its predictions.
    """
    drafting: list[ScheduledSequence] = []
    first_ids: list[int] = []
    row = 0
    for one in scheduled:
        if one.draft_depth > 1 and one.expected:
            drafting.append(one)
            first_ids.append(row + one.samples)
        row += one.samples + one.predict_count
    if not drafting:
        return None
    count, width = len(drafting), max(one.predict_count for one in drafting)
    positions = [one.predict_start - 1 for one in drafting]
    rows = [one.scaling_row + at - one.scaling_start for one, at in zip(drafting, positions, strict=True)]
    last = [one.predict_count - 1 for one in drafting]
    expected = np.full((count, width), NO_DRAFT, np.int64)
    for number, one in enumerate(drafting):
        expected[number, : one.predict_count] = one.expected
    tables = _tables(drafting, kv_cache)
    columns = [np.array(column, np.int64) for column in (first_ids, positions, rows, last)]
    first_id, position, first_row, limit, wanted, table = pack_to_device(
        [*columns, expected.ravel(), tables.ravel()], ids.device
    )
    first = (
        torch.zeros_like(limit) if width == 1 else _first_difference(ids, first_id, limit, wanted.view(count, width))
    )
    group = AttentionGroup(
        start=0,
        segments=count,
        queries=1,
        positions=(position + first)[:, None],
        block_table=table.view(count, -1),
        keys=max(at + rest for at, rest in zip(positions, last, strict=True)) + 1,
        needs_mask=count > 1 or width > 1,
    )
    depth = max(one.draft_depth for one in drafting)
    return Frontier(drafting, depth, width, first, ids.index_select(0, first_id + first), first_row + first, group)


def _first_difference(ids: Tensor, first_id: Tensor, last: Tensor, expected: Tensor) -> Tensor:
    """int64 [n]: of each sequence's predictions the first that is not expected [n, C], at most number `last` [n]."""
    numbers = torch.arange(expected.shape[1], device=ids.device)
    predicted = ids.take(first_id[:, None] + torch.minimum(numbers, last[:, None]))
    is_expected = (predicted == expected) | (expected == ANY_TOKEN)
    return torch.minimum(is_expected.cumprod(1).sum(1), last)


def _tables(drafting: list[ScheduledSequence], kv_cache: KVCache) -> npt.NDArray[np.int64]:
    """The block tables [n, blocks] of the scaling streams, padded with any block."""
    width = max(-(-one.scaling_end // kv_cache.block_size) for one in drafting)
    tables = np.zeros((len(drafting), width), np.int64)
    for number, one in enumerate(drafting):
        blocks = one.sequence.scaling.blocks[:width]
        tables[number, : len(blocks)] = blocks
    return tables


class Chooser:
    """How the drafts of a frontier are chosen, depth by depth (Choose)."""

    def __init__(self, frontier: Frontier, vocabulary: int) -> None:
        rows = [
            SampleRow(one.sequence, one.sequence.drafts[: one.predict_start - len(one.sequence.tokens)], drafted=True)
            for one in frontier.scheduled
        ]
        self._processors: Processors | None = None
        if all(row.sequence.takes_argmax for row in rows):
            return
        device = frontier.first.device
        self._processors = Processors(rows, vocabulary, device, with_grammars=False)
        self._keys: Tensor | None = None
        random, count = [rows[number] for number in self._processors.random], frontier.width + frontier.depth - 2
        if random:
            numbers = np.array(self._processors.random, np.int64)
            keys, index = pack_to_device([_keys(random, count), numbers], device)
            self._keys, self._first = keys.view(-1, count), frontier.first.index_select(0, index)

    def __call__(self, logits: Tensor, depth: int) -> Tensor:
        """logits [n, V] -> int64 [n], the drafts at this depth."""
        if self._processors is None:
            return logits.argmax(-1)
        if self._keys is None:
            return self._processors.choose(logits)
        return self._processors.choose(logits, self._keys.gather(1, self._first[:, None] + (depth - 2))[:, 0])


def _keys(rows: list[SampleRow], count: int) -> npt.NDArray[np.int64]:
    """The keys [n * count] of the noise of `count` tokens after the first prediction of each row."""
    own = [row for row in rows for _ in range(count)]
    return mixed_keys(
        [row.sequence.sampling.seed for row in own],
        [row.sequence.index for row in own],
        [row.output_position + after for row in rows for after in range(1, count + 1)],
    )


def draft_ahead(
    step: Step, scheduled: SequenceOf[ScheduledSequence], ids: Tensor, output: ForwardOutput, kv_cache: KVCache
) -> tuple[list[ScheduledSequence], Tensor] | None:
    """Runs the draft layer behind a step for the sequences that want it, if any: who they are, and the drafts behind
    their frontiers, int64 [n, depth - 1].
    """
    frontier = find_frontier(scheduled, ids, kv_cache)
    if frontier is None:
        return None
    state = output.hidden.index_select(0, frontier.rows)
    start = DraftStart(state, frontier.tokens, frontier.group, frontier.depth)
    return frontier.scheduled, step.draft(start, Chooser(frontier, output.logits.shape[1]), kv_cache)
