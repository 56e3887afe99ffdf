"""The draft layer's file -> its tensors, checked against the base's shape; and back to bytes.

Knows names and shapes only; builds no module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WEIGHTS_FILE = "draft_layer.safetensors"  # beside the draft head's
MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class DraftLayerWeights:
    """Any floating dtype. m is the depth: tokens drafted in all, the first by the base's head; Q is heads * head_dim."""

    mix: torch.Tensor  # [H, 2 H]
    depths: torch.Tensor  # [m - 1, H]
    query: torch.Tensor  # [Q, H]
    output: torch.Tensor  # [H, Q]
    up: torch.Tensor  # [R, H]
    bias: torch.Tensor  # [R]
    down: torch.Tensor  # [H, R]
    agreement: torch.Tensor  # fp32 [m]: share of right drafts at each depth where those before were right, held out

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is computed with, by name."""
        names = ("mix", "depths", "query", "output", "up", "bias", "down")
        return {name: getattr(self, name) for name in names}
