"""What scalings say in a few numbers per position: site mean, entropy, shares. Definitions: DESIGN section 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GateSummary:
    """CPU fp32, one row per position."""

    mean: Tensor  # [n, E], mean over sites of g
    share: Tensor  # [n, E], mean over sites of p = |g| / sum |g|; 0 where the sum is 0
    entropy: Tensor  # [n], nats, mean over the sites whose sum is not 0; NaN where there is none


@torch.inference_mode()
def summarise(scalings: Tensor) -> GateSummary:
    """scalings [n, S, E] on any device -> their summary, copied to the CPU in one transfer."""
    magnitude = scalings.abs()
    total = magnitude.sum(-1, keepdim=True)
    p = magnitude / total.clamp_min(torch.finfo(torch.float32).tiny)
    entropy = -torch.xlogy(p, p).sum(-1)  # [n, S], 0 where the sum is 0
    acting = total[..., 0] != 0
    entropy = entropy.sum(-1) / acting.sum(-1)  # 0 / 0 = NaN where no site acts
    packed = torch.cat([scalings.mean(1), p.mean(1), entropy[:, None]], -1).cpu()
    experts = scalings.shape[-1]
    return GateSummary(packed[:, :experts], packed[:, experts:-1], packed[:, -1])
