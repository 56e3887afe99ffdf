"""XLoraLinear: an nn.Linear plus the gated experts of its site (DESIGN's real pass, two matrix products)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from service.model.experts import ExpertStack
from service.model.gate import Gate


class AdaptedModule(nn.Module):
    """A module of the base with the experts of one site."""

    def __init__(self, gate: Gate, site: int) -> None:
        super().__init__()
        self.gate = gate
        self.site = site


class XLoraLinear(AdaptedModule):
    """y = W x + b, and for the rows the gate is open for: + B_cat((A_cat x) * g). Inference only."""

    bias: nn.Parameter | None
    lora_a: Tensor  # [R, in]
    lora_b_t: Tensor  # [R, out]

    def __init__(self, base: nn.Linear, stack: ExpertStack, gate: Gate, site: int) -> None:
        super().__init__(gate, site)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.register_buffer("lora_a", stack.a, persistent=False)
        self.register_buffer("lora_b_t", stack.b_t, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, in] -> [..., T, out]; leading dimensions are 1 (one flat batch of rows)."""
        y = F.linear(x, self.weight, self.bias)
        gate = self.gate
        if gate.active:
            rows = x.view(-1, self.in_features)[gate.first_row :]
            ranks = F.linear(rows, self.lora_a).mul_(gate.at(self.site))
            y.view(-1, self.out_features)[gate.first_row :].addmm_(ranks, self.lora_b_t)
        return y
