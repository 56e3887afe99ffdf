"""Step: the interface of everything that can run a Batch: eagerly, with CUDA graphs, in C++, or on several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from service.model.batch import Batch, DraftStart
from service.model.draft_layer import Choose
from service.model.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """The output of one forward."""

    logits: Tensor  # [L, V] of the batch's logit_rows, in the base's dtype
    gate_logits: Tensor  # [num_scaling_rows, S, E] fp32, before softmax and steering (S = 1 without layerwise scalings)
    scalings: Tensor  # [num_scaling_rows, S, E] fp32, as they were stored
    hidden: Tensor  # [T or more, H], the last hidden state; rows beyond T are padding


class Step(Protocol):
    """XLoraModel (operators of torch), CapturedSteps (CUDA graphs), NativeStep (C++), Leader (every rank at once)."""

    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Runs the batch. Writes to `kv_cache` its given gate rows, its keys and values, and new scalings.

        The scalings of real rows must have been stored by an earlier forward.
        """

    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> Tensor:
        """Runs the model's draft layer after rows of the latest forward: int64 [n, depth - 1], the next drafts."""
