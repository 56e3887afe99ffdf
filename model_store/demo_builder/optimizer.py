"""Muon for the matrices, AdamW for the rest: the same loss in about half the steps of AdamW alone.

Muon (Keller Jordan 2024): the momentum of each matrix is replaced by the nearest (semi-)orthogonal matrix.
torch's own version works in bf16, which is very slow on most CPUs; this one in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards U V^T of the singular value decomposition; leading dimensions are a batch."""
    tall = matrix.size(-2) > matrix.size(-1)
    x: Tensor = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.mT if tall else x
    return out


class Muon(torch.optim.Optimizer):
    """Updates scaled to the root mean square of AdamW's, so that both take the same learning rate."""

    def __init__(
        self, parameters: Iterable[Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.size(-2), p.size(-1)) ** 0.5)
