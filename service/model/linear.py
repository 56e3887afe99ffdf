"""XLoraLinear: an nn.Linear plus the gated experts of its site (DESIGN's real pass, two matrix products)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.experts import ExpertStack
from service.model.gate import Gate


class XLoraLinear(nn.Module):
    """y = W x + b, and for the rows the gate is open for: + B_cat((A_cat x) * g). Inference only."""

    def __init__(self, base: nn.Linear, stack: ExpertStack, gate: Gate, site: int) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.register_buffer("lora_a", stack.a, persistent=False)
        self.register_buffer("lora_b_t", stack.b_t, persistent=False)
        self.gate = gate
        self.site = site
        # The same tensors as plain attributes: nn.Module finds parameters and buffers through a slow __getattr__.
        self._base = (base.weight, base.bias)
        self._experts = (stack.a.T, stack.b_t)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, in] -> [..., T, out]; leading dimensions are 1 (one flat batch of rows)."""
        y = F.linear(x, *self._base)
        gate = self.gate
        if gate.active:
            a_t, b_t = self._experts
            narrow = torch.mm(x.view(-1, self.in_features)[gate.first_row :], a_t).mul_(gate.at(self.site))
            y.view(-1, self.out_features)[gate.first_row :].addmm_(narrow, b_t)
        return y
