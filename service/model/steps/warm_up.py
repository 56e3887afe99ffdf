"""Idle batches, whose results nobody reads: for the warm-up at start, for capturing, and for timing."""

from __future__ import annotations

import torch
from torch import Tensor

from service.model.batch import AttentionGroup, Batch, DraftStart
from service.model.draft_layer import PureChoice, take_largest
from service.model.kv_cache import KVCache
from service.model.steps.step import Step


def warm_up(step: Step, kv_cache: KVCache, *, drafts: bool) -> None:
    """Runs an idle scaling row and real row, and the draft layer if `drafts`, so that libraries allocate and attention
    selects its backend.

    A model that cannot run on this device fails here, while the engine starts.
    """
    output = step.forward(idle_batch(kv_cache, 2), kv_cache)
    if drafts:
        draft_idly(step, kv_cache, output.hidden[:1])


def idle_batch(kv_cache: KVCache, count: int) -> Batch:
    """A batch of `count` rows, half of them (rounded down) scaling rows, at position 0 in the scratch block."""
    scratch, dummy = kv_cache.scratch_slot, kv_cache.dummy_slot
    device = kv_cache.gate_rows.device
    # token, position, KV slot, gate slot, new gate slot, is scaling
    scaling_rows = count // 2
    fields = torch.tensor([[0, 0, scratch, dummy, scratch, 0]], device=device).repeat(count, 1).T.contiguous()
    fields[5, :scaling_rows] = 1
    table = torch.full((count, 1), kv_cache.num_blocks, device=device)
    group = AttentionGroup(0, count, 1, fields[1, :, None], table, 1, needs_mask=False)
    return Batch(fields, scaling_rows, torch.arange(count, device=device), [group])


def draft_idly(step: Step, kv_cache: KVCache, hidden: Tensor, depth: int = 2) -> None:
    """Runs the draft layer, depth - 1 times, from hidden [1, H] at position 0 in the scratch block."""
    step.draft(idle_start(kv_cache, hidden, depth), PureChoice(take_largest, ()), kv_cache)


def idle_start(kv_cache: KVCache, hidden: Tensor, depth: int = 2) -> DraftStart:
    """A start that drafts depth - 1 tokens from hidden [1, H], at position 0 in the scratch block."""
    zeros = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
    group = AttentionGroup(0, 1, 1, zeros, zeros + kv_cache.num_blocks, 1, needs_mask=False)
    return DraftStart(hidden, zeros[0], group, depth)
