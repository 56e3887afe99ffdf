"""The first step on a device, before there is a request."""

from __future__ import annotations

import torch

from service.model.batch import AttentionGroup, Batch
from service.model.kv_cache import KVCache
from service.model.steps.step import Step


def warm_up(step: Step, kv_cache: KVCache) -> None:
    """Runs a scaling row and a real row whose outcome nobody reads: libraries allocate, attention finds its backend.

    What cannot run on this device fails here, while the engine starts.
    """
    scratch, dummy = kv_cache.scratch_slot, kv_cache.dummy_slot
    device = kv_cache.gate_rows.device
    # token, position, KV slot, gate slot, new gate slot, is scaling
    rows = torch.tensor([[0, 0, scratch, dummy, scratch, 1], [0, 0, scratch, dummy, scratch, 0]], device=device).T
    table = torch.full((2, 1), kv_cache.num_blocks, device=device)
    group = AttentionGroup(0, 2, 1, rows[1, :, None], table, 1, needs_mask=False)
    step.forward(Batch(rows.contiguous(), 1, torch.arange(2, device=device), [group]), kv_cache)
