"""The decode step as one function of tensors: what can be compiled ahead of time or captured in a graph.

Every row is a segment of its own, so any number of requests, scaling rows and real rows alike, is one call:

    rows [6, T], gate_slots [G], block_table [T, W]  ->  logits [T, V], gate logits [T, S, E]

Prompts, where a segment has many rows, stay with XLoraModel.forward.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from service.model import decode_kernels
from service.model.batch import AttentionGroup, Batch
from service.model.gate import NO_KERNELS
from service.model.kv_cache import KVCache
from service.model.xlora_model import XLoraModel


class DecodeStep(nn.Module):
    """XLoraModel.forward for rows that all look alike. Experts act on the last G of them.

    It holds no tensor of its own: `state()` names those of the model, which a compiled step is given to read.
    """

    def __init__(self, model: XLoraModel, least_rows: int = 1, *, kernels: bool = False) -> None:
        """`least_rows` is a promise about T, which lets it choose kernels. `kernels`: it is to be traced, and calls
        decode_kernels.
        """
        super().__init__()
        self._least_rows = least_rows
        self._kernels = kernels
        self._own_linears = kernels and least_rows == 1  # for many rows the BLAS libraries are as good
        self.causal_lm = model.causal_lm
        self.classifier = model.classifier
        self.gate = model.gate
        self.draft_head = model.draft_head
        self._model = (model,)  # in a tuple, so that it is not a second way to the same tensors

    def forward(
        self,
        rows: Tensor,
        gate_slots: Tensor,
        block_table: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        gate_rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One step. Writes keys, values and new scalings in place. Returns logits [T, V] and the gate's [T, S, E]."""
        [model] = self._model
        positions = rows[1][:, None]
        width = block_table.shape[1] * keys[0].shape[1]
        group = AttentionGroup(0, rows.shape[1], 1, positions, block_table, keys=width, needs_mask=True)
        batch = Batch(rows, 0, torch.empty(0, dtype=torch.int64), [group])
        if self._kernels:
            batch.attend = decode_kernels.traced_attention
        kernels = decode_kernels.TRACED if self._own_linears else NO_KERNELS  # the rest the compiler fuses
        self.gate.choose(kernels, self._least_rows)
        self.gate.set(gate_rows.index_select(0, gate_slots), first_row=rows.shape[1] - gate_slots.shape[0])
        with decode_kernels.PlainLinears() if self._own_linears else nullcontext():
            logits, hidden = model.run_decoder(batch, KVCache(keys, values, gate_rows), 0)
            gate_logits = self.classifier.logits(hidden)
        self.gate.clear()  # torch.export wants every module as it was
        self.gate.choose(NO_KERNELS, self._least_rows)
        gate_rows.index_copy_(0, batch.new_gate_slots, self.classifier.scalings(gate_logits))
        return logits, gate_logits

    def state(self) -> dict[str, Tensor]:
        """Every tensor the step reads besides its arguments, by the name torch.export gives it."""
        return dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers(remove_duplicate=False))
