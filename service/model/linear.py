"""XLoraLinear: an nn.Linear plus the gated experts of its site (DESIGN's real pass, two matrix products)."""

from __future__ import annotations

from typing import Any

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
        self.register_parameter("bias", base.bias)
        self.register_buffer("lora_a_t", stack.a.T, persistent=False)
        self.register_buffer("lora_b_t", stack.b_t, persistent=False)
        self.gate: Gate
        self.__dict__["gate"] = gate  # not a submodule: it belongs to the model, once
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, in] -> [..., T, out]; leading dimensions are 1 (one flat batch of rows)."""
        # Read from their dictionaries: as attributes they are found through nn.Module's slow __getattr__.
        own: dict[str, Any] = self._parameters
        experts: dict[str, Any] = self._buffers
        y = F.linear(x, own["weight"], own["bias"])
        gate = self.gate
        if gate.active:
            first = gate.first_row
            narrow = torch.mm(x.view(-1, self.in_features)[first:], experts["lora_a_t"]).mul_(gate.at(self.site))
            y.view(-1, self.out_features)[first:].addmm_(narrow, experts["lora_b_t"])
        return y
