"""The draft layer's static buffers, without CUDA: what a graph of a bucket reads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from service.model.batch import AttentionGroup, DraftStart
from service.model.draft_layer import Choose, PureChoice, take_largest
from service.model.kv_cache import KVCache
from service.model.steps.captured_drafts import CapturedDrafts, Replay

BLOCK_SIZE, WIDTHS = 4, [8, 32]


def start(count: int, position: int) -> DraftStart:
    """So many sequences, all of them at a position."""
    width = position // BLOCK_SIZE + 1
    positions = torch.full((count, 1), position)
    group = AttentionGroup(0, count, 1, positions, torch.ones(count, width, dtype=torch.int64), position + 1, True)
    return DraftStart(torch.zeros(count, 8), torch.zeros(count, dtype=torch.int64), group, depth=4)


def test_what_a_long_text_left_is_within_a_narrow_table() -> None:
    """A row that nobody fills attends like the others, over a table as wide as the bucket's: the position of an earlier
    call's long text would take a kernel behind it.
    """
    seen: list[AttentionGroup] = []

    class Eager:
        def draft(self, given: DraftStart, choose: Choose, kv_cache: KVCache) -> torch.Tensor:
            seen.append(given.group)
            return torch.zeros(len(given.tokens), 3, dtype=torch.int64)

    def capture(work: Replay) -> Callable[[], torch.Tensor]:
        return work

    eager: Any = Eager()
    cache: Any = SimpleNamespace(block_size=BLOCK_SIZE, num_blocks=50)
    hidden = torch.zeros(1, 8)
    drafts = CapturedDrafts(eager, cache, capture, hidden=hidden, depth=4, max_sequences=8, width_buckets=WIDTHS)
    for count, position in ((4, 100), (3, 5), (1, 100), (5, 31)):
        drafts.draft(start(count, position), PureChoice(take_largest, ()))
        group = seen[-1]
        assert group.block_table.shape == (len(group.positions), WIDTHS[position > 31])
        assert int(group.positions.max()) < group.keys == group.block_table.shape[1] * BLOCK_SIZE
        assert group.positions[:count].eq(position).all()
