"""The decode step as one function of tensors: what can be captured in a graph.

Every row is a segment of its own, so any number of requests, scaling rows and real rows alike, is one call:

    rows [6, T], block_table [T, W]  ->  logits [T, V], gate logits [T, S, E]

Prompts, where a segment has many rows, stay with XLoraModel.forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.model.batch import AttentionGroup, Batch
from service.model.kv_cache import KVCache
from service.model.xlora_model import XLoraModel


class DecodeStep:
    """XLoraModel.forward for rows that all look alike. Experts act on each: scaling rows read the dummy row's gate."""

    def __init__(self, model: XLoraModel) -> None:
        self._model = model

    def __call__(
        self,
        rows: Tensor,
        block_table: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        gate_rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One step. Writes keys, values and new scalings in place. Returns logits [T, V] and the gate's [T, S, E]."""
        model, gate = self._model, self._model.gate
        positions = rows[1][:, None]
        width = block_table.shape[1] * keys[0].shape[1]
        group = AttentionGroup(0, rows.shape[1], 1, positions, block_table, keys=width, needs_mask=True)
        batch = Batch(rows, 0, torch.empty(0, dtype=torch.int64), [group])
        gate.set(gate_rows.index_select(0, batch.gate_slots), first_row=0)
        logits, hidden = model.run_decoder(batch, KVCache(keys, values, gate_rows), 0)
        gate_logits = model.classifier.logits(hidden)
        gate_rows.index_copy_(0, batch.new_gate_slots, model.classifier.scalings(gate_logits))
        return logits, gate_logits
