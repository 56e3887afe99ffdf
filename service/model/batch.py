"""One forward pass as plain tensors: a flat batch of T rows, each with a token, a position, a KV stream and a gate row.

Rows are ordered so that two facts need no index: scaling rows come first (`num_scaling_rows` of them), and the rows of
one AttentionGroup are contiguous. The batch knows nothing of requests, sampling or scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionGroup:
    """N segments of Q consecutive positions, each in a KV stream of its own; rows start .. start + N * Q."""

    start: int
    segments: int  # N
    queries: int  # Q
    positions: Tensor  # int64 [N, Q]
    block_table: Tensor  # int64 [N, blocks], padded with any valid block: padding is masked
    keys: int  # L: keys looked at, at most blocks * block_size
    needs_mask: bool  # False where every key in 0 .. L-1 is visible to every query
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Returns [N, 1, Q, L], 0 where the key is visible and -inf elsewhere, or None where every key is.

        `window` is a sliding window in tokens. Additive, and made once for all layers: SDPA would turn a bool mask into
        this in every layer.
        """
        if not self.needs_mask and (window is None or window >= self.keys):
            return None
        if window not in self._masks:
            key = torch.arange(self.keys, device=self.positions.device)
            query = self.positions[:, None, :, None]
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self._masks[window] = hidden.masked_fill_(~visible, float("-inf"))
        return self._masks[window]


@dataclass(slots=True)
class Batch:
    """T rows, S sites (1 where the gate is the same at every site), E experts."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    kv_slots: Tensor  # int64 [T], where each row's key and value are written
    num_scaling_rows: int
    real_gate_slots: Tensor  # int64 [T - num_scaling_rows], where each real row's scalings are read
    new_gate_rows: Tensor  # int64 [K], scaling rows whose scalings are stored ...
    new_gate_slots: Tensor  # int64 [K], ... and where
    logit_rows: Tensor  # int64 [L], rows whose logits are wanted
    groups: list[AttentionGroup]
