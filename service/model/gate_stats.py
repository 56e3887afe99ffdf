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
    rows = scalings.permute(2, 0, 1).contiguous()  # [E, n, S]: sums over a last dimension of a few experts are slow
    magnitude = rows.abs()
    total = magnitude.sum(0)
    tiny = torch.finfo(torch.float32).tiny
    p = magnitude / total.clamp_min(tiny)
    entropy = (p * p.clamp_min(tiny).log_().neg_()).sum((0, 2))  # [n], 0 where the sum is 0
    entropy /= (total != 0).sum(-1)  # 0 / 0 = NaN where no site acts
    packed = torch.cat([rows.mean(-1), p.mean(-1), entropy[None]]).T.cpu()
    experts = scalings.shape[-1]
    return GateSummary(packed[:, :experts], packed[:, experts:-1], packed[:, -1])
