"""The draft head: corrects a scaling row's hidden state towards the real pass, so that its drafts are right more often.

    h' = h + D silu(U h + b)        in scaling rows, before the head; real rows stay unchanged

The scaling pass runs the base model, and its next token is a draft for the real pass (DESIGN section 3). The change
that the experts make to it is partly a function of the hidden state alone, which can be learned (tools/distill/). A
draft only decides whether work done early is kept, so a draft head changes no token and no scaling in float32. Source:
the residual block of Medusa's heads (arXiv 2401.10774), here with a low rank, and without a head of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.checkpoint import DraftHeadWeights


class DraftHead(nn.Module):
    """U [R, H], b [R] and D [H, R] in the base's dtype, on its device."""

    def __init__(self, weights: DraftHeadWeights, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        tensors = (tensor.to(device, dtype) for tensor in (weights.up, weights.bias, weights.down))
        self.up, self.bias, self.down = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
        self.tensors = [self.up.data, self.bias.data, self.down.data]

    def forward(self, hidden: Tensor, is_scaling: Tensor) -> Tensor:
        """hidden [..., T, H] and is_scaling [T], 0 for real rows -> the input of the model's head, [..., T, H]."""
        return torch.where(is_scaling[:, None] != 0, self.drafting(hidden), hidden)

    def drafting(self, hidden: Tensor) -> Tensor:
        """h' [..., H] of hidden [..., H], all of scaling rows."""
        return hidden + F.linear(F.silu(F.linear(hidden, self.up, self.bias)), self.down)
