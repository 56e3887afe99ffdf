"""Summaries of scalings per position: mean over sites, entropy, each expert's share. Defined in DESIGN section 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.model.transfer import HostCopies

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class GateSummary:
    """The summary of n positions, float32."""

    mean: npt.NDArray[np.float32]  # [n, E], mean over sites of g
    share: npt.NDArray[np.float32]  # [n, E], mean over sites of p = |g| / sum |g|; 0 where the sum is 0
    entropy: npt.NDArray[np.float32]  # [n], nats, mean over the sites whose sum is not 0; NaN where there is none


class PendingSummary:
    """The summary of scalings [n, S, E]: computed at once on a GPU's stream, and on a CPU when it is read."""

    def __init__(self, scalings: Tensor, copies: HostCopies) -> None:
        """A GPU's summary is copied with `copies`. On a CPU, `scalings` are read later, and must not be overwritten."""
        self._scalings = scalings if scalings.is_cpu else None  # no reference to a GPU's: it would hold memory
        if self._scalings is None:
            mean, share, entropy = _summary(scalings.permute(2, 0, 1).contiguous(), torch.log)
            self._packed = copies.of(torch.cat([mean, share, entropy[None]]))

    def read(self) -> GateSummary:
        """The summary, once a GPU's copies have arrived."""
        if self._scalings is not None:  # numpy has less overhead per call
            rows = np.ascontiguousarray(self._scalings.numpy().transpose(2, 0, 1))
            with np.errstate(invalid="ignore"):
                mean, share, entropy = _summary(rows, np.log)
        else:
            packed = self._packed.numpy()
            experts = len(packed) // 2
            mean, share, [entropy] = np.split(packed, [experts, 2 * experts])
        return GateSummary(mean.T, share.T, entropy)


def _summary(rows: Any, log: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """rows [E, n, S] -> mean [E, n], share [E, n], entropy [n], for arrays and tensors. E comes first because sums over
    a last dimension of a few experts are slow.
    """
    sites = rows.shape[-1]
    magnitude = abs(rows)
    total = magnitude.sum(0)
    p = magnitude / (total + _TINY)
    entropy = 0 - (p * log(p + _TINY)).sum(0).sum(-1)  # 0 where the sum is 0, never -0
    entropy /= (total != 0).sum(-1)  # 0 / 0 = NaN where no site acts
    return rows.sum(-1) / sites, p.sum(-1) / sites, entropy
