"""What scalings say in a few numbers per position: site mean, entropy, shares. Definitions: DESIGN section 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class GateSummary:
    """float32, one row per position."""

    mean: npt.NDArray[np.float32]  # [n, E], mean over sites of g
    share: npt.NDArray[np.float32]  # [n, E], mean over sites of p = |g| / sum |g|; 0 where the sum is 0
    entropy: npt.NDArray[np.float32]  # [n], nats, mean over the sites whose sum is not 0; NaN where there is none


def summarise(scalings: Tensor) -> GateSummary:
    """scalings [n, S, E] -> their summary: of a CPU's by numpy, whose calls cost less, of a GPU's in one transfer."""
    if scalings.is_cpu:
        rows = np.ascontiguousarray(scalings.numpy().transpose(2, 0, 1))
        with np.errstate(invalid="ignore"):
            mean, share, entropy = _summary(rows, np.log)
    else:
        mean, share, entropy = _summary(scalings.permute(2, 0, 1).contiguous(), torch.log)
        packed = torch.cat([mean, share, entropy[None]]).cpu().numpy()
        mean, share, [entropy] = np.split(packed, [len(mean), 2 * len(mean)])
    return GateSummary(mean.T, share.T, entropy)


def _summary(rows: Any, log: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """rows [E, n, S] (sums over a last dimension of a few experts are slow) -> mean [E, n], share [E, n], entropy [n].
    Arrays or tensors.
    """
    sites = rows.shape[-1]
    magnitude = abs(rows)
    total = magnitude.sum(0)
    p = magnitude / (total + _TINY)
    entropy = 0 - (p * log(p + _TINY)).sum(0).sum(-1)  # 0 where the sum is 0, never -0
    entropy /= (total != 0).sum(-1)  # 0 / 0 = NaN where no site acts
    return rows.sum(-1) / sites, p.sum(-1) / sites, entropy
