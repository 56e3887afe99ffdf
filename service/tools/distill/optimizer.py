"""Muon for matrices: a lower loss than AdamW's in the same number of steps.

Muon (Keller Jordan 2024): the momentum of each matrix is replaced by the nearest (semi-)orthogonal one. torch's own
version works in bfloat16, which took three times as long as the rest of a step on a CPU; this one works in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95
_UPDATE_SIZE = 0.2  # root mean square of an update of AdamW's, so that both take the same learning rate


class Muon(torch.optim.Optimizer):
    """For parameters that are matrices, or stacks of them."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                update = _orthogonal(parameter.grad.lerp(momentum, _MOMENTUM))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * _UPDATE_SIZE * max(parameter.shape[-2:]) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz steps towards U V^T of the singular value decomposition; leading dimensions are a batch."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.mT if tall else x
    return found
