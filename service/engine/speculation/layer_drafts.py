"""Runs the draft layer behind a step: finds the row it starts from in each sequence, and how its tokens are chosen.

In each sequence, the first prediction of the scaling pass that differs from the expected token becomes a draft, and the
draft layer continues from its row. On a GPU that row is found on the device, where the predictions still are, so the
host does not wait; Sequence.predict finds the same one again later.

A draft is chosen like a sampled token, with the noise of its position and the processors of the known text: drafts do
not count for penalties yet, and those that a grammar does not allow are dropped when they arrive.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.engine.noise import gumbel_noise, mixed_keys
from service.engine.plan import ScheduledSequence
from service.engine.sampler import Processors, SampleRow
from service.engine.speculation.drafters import ANY_TOKEN, NO_DRAFT
from service.model.batch import AttentionGroup, DraftStart
from service.model.draft_layer import Choose, PureChoice, take_largest
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput, Step
from service.model.transfer import pack_to_device, to_device


@dataclass(slots=True)
class Frontier:
    """The starting points of the draft layer in n sequences. C: the largest number of predictions of one of them."""

    scheduled: list[ScheduledSequence]
    depth: int  # the largest draft depth of one of them
    width: int  # C
    first: Tensor  # int64 [n], the index of the first prediction that differs
    tokens: Tensor  # int64 [n], that prediction
    rows: Tensor  # int64 [n], its scaling row in the flat batch
    group: AttentionGroup


def find_frontier(scheduled: SequenceOf[ScheduledSequence], ids: Tensor, kv_cache: KVCache) -> Frontier | None:
    """The frontier of the sequences with a draft depth over 1; None without any. `ids`, int64 [R], are the step's
    sampled ids: of each sequence its samples, then its predictions.
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
    width = max(one.predict_count for one in drafting)
    positions = [one.predict_start - 1 for one in drafting]
    rows = [one.scaling_row + at - one.scaling_start for one, at in zip(drafting, positions, strict=True)]
    last = [one.predict_count - 1 for one in drafting]
    expected = np.full((len(drafting), width), NO_DRAFT, np.int64)
    for number, one in enumerate(drafting):
        expected[number, : one.predict_count] = one.expected
    columns = [np.array(column, np.int64) for column in (first_ids, positions, rows, last)]
    tables = _tables(drafting, kv_cache)
    first_id, position, first_row, limit, wanted, table = pack_to_device(
        [*columns, expected.ravel(), tables.ravel()], ids.device
    )
    if ids.device.type == "cpu":
        first = _known_differences(drafting, first_ids, ids)
    elif width == 1:
        first = torch.zeros_like(limit)
    else:
        first = _first_differences(ids, first_id, limit, wanted.view(-1, width))
    group = AttentionGroup(
        start=0,
        segments=len(drafting),
        queries=1,
        positions=(position + first)[:, None],
        block_table=table.view(len(drafting), -1),
        keys=max(one.predict_start - 1 + one.predict_count for one in drafting),
        needs_mask=len(drafting) > 1 or width > 1,
    )
    depth = max(one.draft_depth for one in drafting)
    return Frontier(drafting, depth, width, first, ids.index_select(0, first_id + first), first_row + first, group)


def _known_differences(drafting: list[ScheduledSequence], first_ids: list[int], ids: Tensor) -> Tensor:
    """_first_differences of ids that are on the host already."""
    known = ids.tolist()
    found: list[int] = []
    for one, first_id in zip(drafting, first_ids, strict=True):
        pairs = enumerate(zip(known[first_id : first_id + one.predict_count], one.expected, strict=True))
        differing = (number for number, (token, other) in pairs if other not in (token, ANY_TOKEN))
        found.append(next(differing, one.predict_count - 1))
    return to_device(found, ids.device)


def _first_differences(ids: Tensor, first_id: Tensor, last: Tensor, expected: Tensor) -> Tensor:
    """The index, int64 [n], of each sequence's first prediction that differs from `expected` [n, C]; `last` [n] if none
    before it does.
    """
    numbers = torch.arange(expected.shape[1], device=ids.device)
    predicted = ids.take(first_id[:, None] + torch.minimum(numbers, last[:, None]))
    is_expected = (predicted == expected) | (expected == ANY_TOKEN)
    return torch.minimum(is_expected.cumprod(1).sum(1), last)


def _tables(drafting: list[ScheduledSequence], kv_cache: KVCache) -> npt.NDArray[np.int64]:
    """The block tables [n, blocks] of the scaling streams, padded with block 0."""
    width = max(-(-one.scaling_end // kv_cache.block_size) for one in drafting)
    tables = np.zeros((len(drafting), width), np.int64)
    for number, one in enumerate(drafting):
        blocks = one.sequence.scaling.blocks[:width]
        tables[number, : len(blocks)] = blocks
    return tables


def choice_of(frontier: Frontier, vocabulary: int) -> Choose:
    """The function that chooses the drafts of a frontier from logits, depth by depth."""
    rows = [
        SampleRow(one.sequence, one.sequence.drafts[: one.predict_start - len(one.sequence.tokens)], drafted=True)
        for one in frontier.scheduled
    ]
    if all(row.sequence.takes_argmax for row in rows):
        return PureChoice(take_largest, ())
    device, count, params = frontier.first.device, frontier.depth - 1, [row.sequence.sampling for row in rows]
    temperature = np.array([0.0 if each.is_greedy else each.temperature for each in params], np.float32)
    candidates, temperatures = pack_to_device([_keys(rows, frontier.width - 1 + count), temperature], device)
    after = frontier.first[:, None] + torch.arange(count, device=device)
    keys = candidates.view(len(rows), -1).gather(1, after)
    if all(each.is_plain for each in params):
        return PureChoice(_drawn, (temperatures, keys))
    return _Processed(Processors(rows, vocabulary, device, with_grammars=False), keys)


def _drawn(logits: Tensor, depth: int, inputs: tuple[Tensor, ...]) -> Tensor:
    """Chooses with temperature and noise keys as `inputs`; greedily where the temperature is 0."""
    temperature, keys = inputs[0][:, None], inputs[1][:, depth - 2]
    logits = logits.float()
    noisy = logits / temperature + gumbel_noise(keys, logits.shape[1])
    return torch.where(temperature > 0, noisy, logits).argmax(-1)


def idle_choices(depth: int, device: torch.device) -> list[PureChoice]:
    """The choices that a CUDA graph can contain, for one idle row, to capture them with."""
    keys = torch.zeros(1, depth - 1, dtype=torch.int64, device=device)
    return [PureChoice(take_largest, ()), PureChoice(_drawn, (keys[:, 0].float(), keys))]


class _Processed:
    """Chooses with the logits processors of each sequence's known text."""

    def __init__(self, processors: Processors, keys: Tensor) -> None:
        self._processors = processors
        self._keys = keys.index_select(0, to_device(processors.random, keys.device))

    def __call__(self, logits: Tensor, depth: int) -> Tensor:
        return self._processors.choose(logits, self._keys[:, depth - 2])


def _keys(rows: list[SampleRow], count: int) -> npt.NDArray[np.int64]:
    """The noise keys [n * count] of the `count` tokens after the first prediction of each row."""
    own = [row for row in rows for _ in range(count)]
    return mixed_keys(
        [row.sequence.sampling.seed for row in own],
        [row.sequence.index for row in own],
        [row.output_position + after for row in rows for after in range(1, count + 1)],
    )


def draft_ahead(
    step: Step, scheduled: SequenceOf[ScheduledSequence], ids: Tensor, output: ForwardOutput, kv_cache: KVCache
) -> tuple[list[ScheduledSequence], Tensor] | None:
    """Runs the draft layer behind a step for the sequences with a draft depth over 1. Returns them, and their drafts,
    int64 [n, depth - 1]; None without any.
    """
    frontier = find_frontier(scheduled, ids, kv_cache)
    if frontier is None:
        return None
    state = output.hidden.index_select(0, frontier.rows)
    start = DraftStart(state, frontier.tokens, frontier.group, frontier.depth)
    return frontier.scheduled, step.draft(start, choice_of(frontier, output.logits.shape[1]), kv_cache)
