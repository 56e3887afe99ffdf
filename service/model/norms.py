"""RMS norms of the decoder in fewer calls, where that gives the same bits.

Every family has a module of its own for the same formula, with casts that float32 does not need. Which ones compute it
shows in what they return, not in their names: Gemma's norm multiplies by 1 + weight, half precisions round in between,
and those stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.model.gate import Gate, GateReader

_ROWS = 8


class RMSNorm(GateReader):
    """y = x / sqrt(mean(x^2) + eps) * weight, in the dtype of x."""

    def __init__(self, weight: nn.Parameter, eps: float, gate: Gate) -> None:
        super().__init__(gate)
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> y [..., H]."""
        kernel = self.gate.kernels.norm
        if kernel is not None:
            return kernel(x, self.weight, self.eps)
        scale = (x * x).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (x * scale).mul_(self.weight)

    __call__ = forward  # as XLoraLinear's


@torch.no_grad()
def replace_norms(causal_lm: nn.Module, dtype: torch.dtype, gate: Gate) -> None:
    """Replaces every norm of the decoder for which RMSNorm returns exactly the same. `dtype` is that of the hidden
    states: some families keep their norms' weights in float32 whatever that is.
    """
    for name, module in list(causal_lm.named_modules()):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        parameters = dict(module.named_parameters())
        weight = parameters.get("weight")
        if eps is None or weight is None or len(parameters) > 1 or weight.dim() != 1 or weight.is_meta:
            continue
        if weight.dtype != dtype:
            continue
        own = RMSNorm(weight, eps, gate)
        x = torch.randn(_ROWS, *weight.shape, dtype=dtype, device=weight.device)
        if torch.equal(module(x), own(x)):
            causal_lm.set_submodule(name, own)
