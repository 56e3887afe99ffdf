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
        index: list[int] = []
        for site, site_ranks in enumerate(ranks):
            for expert, rank in enumerate(site_ranks):
                index += [(site if layerwise else 0) * len(site_ranks) + expert] * rank
        self._widths = [sum(site_ranks) for site_ranks in ranks]
        self._index = torch.tensor(index, device=device)  # int64 [sum of all ranks], into a flattened [S, E] row
        self._spread: list[Tensor] = []
        self.logit_rows = torch.empty(0, dtype=torch.int64, device=device)  # int64 [L]: the rows that the head sees
        self.active = False  # whether experts act on any row of this forward

    def set(self, scalings: Tensor | None, first_row: int) -> None:
        """Sets the scalings [n, S, E] of rows first_row .. first_row + n; None or n = 0 switches the experts off."""
        self.first_row = first_row
        self.active = scalings is not None and scalings.shape[0] > 0
        if scalings is None or not self.active:
            self._spread = []
            return
        if self.global_scaling_weight != 1.0:
            scalings = scalings * self.global_scaling_weight
        spread = scalings.to(self._dtype).flatten(1).index_select(1, self._index)
        self._spread = list(spread.split_with_sizes(self._widths, 1))

    def at(self, site: int) -> Tensor:
        """Returns [n, R]: the scaling of every rank of the site's stack, for rows first_row .. first_row + n."""
        return self._spread[site]
