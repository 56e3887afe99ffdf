"""The gate of the forward under way: which weight every expert has, per row and per site.

An `nn.Linear` receives only x, so the adapted linears read their scalings from the one Gate their model owns.
The Gate does not compute scalings (classifier.py does) and does not store them between forwards (kv_cache.py does).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Gate:
    """Spreads scalings [n, S, E] over the ranks of the stacked experts, once per forward for all sites.

    `ranks[s][e]` is the rank of expert e at site s, 0 where it does not target the site.
    Where scalings come as [n, 1, E] (no layerwise scalings) the one row serves every site.
    """

    def __init__(self, ranks: list[list[int]], *, layerwise: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.global_scaling_weight = 1.0
        self.first_row = 0  # rows before it have an all-zero gate: no expert acts on them
        self._dtype = dtype
        self._columns: list[tuple[int, int]] = []
        index: list[int] = []
        for site, site_ranks in enumerate(ranks):
            start = len(index)
            for expert, rank in enumerate(site_ranks):
                index += [(site if layerwise else 0) * len(site_ranks) + expert] * rank
            self._columns.append((start, len(index)))
        self._index = torch.tensor(index, device=device)  # int64 [sum of all ranks], into a flattened [S, E] row
        self._spread: list[Tensor] | None = None

    @property
    def active(self) -> bool:
        """Whether any row of this forward has experts acting on it."""
        return self._spread is not None

    def set(self, scalings: Tensor | None, first_row: int) -> None:
        """Sets the scalings [n, S, E] of rows first_row .. first_row + n; None or n = 0 switches the experts off."""
        self.first_row = first_row
        if scalings is None or scalings.shape[0] == 0:
            self._spread = None
            return
        if self.global_scaling_weight != 1.0:
            scalings = scalings * self.global_scaling_weight
        spread = scalings.to(self._dtype).flatten(1).index_select(1, self._index)
        self._spread = [spread[:, start:end] for start, end in self._columns]

    def at(self, site: int) -> Tensor:
        """Returns [n, R]: the scaling of every rank of the site's stack, for rows first_row .. first_row + n."""
        assert self._spread is not None, "read of an inactive gate"
        return self._spread[site]
