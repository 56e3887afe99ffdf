"""The gate of the current forward: one weight per row, site and expert.

An `nn.Linear` receives only x, so the adapted modules read their scalings from the one Gate that their model owns.
The Gate does not compute scalings (classifier.py does), and does not store them between forwards (kv_cache.py does).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Gate:
    """Expands scalings [n, S, E] to the ranks of the stacked experts, once per forward for all sites.

    `ranks[s][e]` is the rank of expert e at site s, 0 where it does not target the site.
    Scalings [n, 1, E] (no layerwise scalings) are used at every site.
    """

    def __init__(self, ranks: list[list[int]], *, layerwise: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.global_scaling_weight = 1.0
        self.first_row = 0  # no expert acts on rows before it
        self.dtype = dtype  # of the arithmetic
        index: list[int] = []
        for site, site_ranks in enumerate(ranks):
            for expert, rank in enumerate(site_ranks):
                index += [(site if layerwise else 0) * len(site_ranks) + expert] * rank
        self._sizes = [sum(site_ranks) for site_ranks in ranks]  # R of each site
        self._offsets = [0, *accumulate(self._sizes)]  # of each site's ranks among all
        self.rank_index = torch.tensor(index, device=device)  # int64 [sum of all ranks], into a flattened [S, E] row
        self._spread: Tensor | None = None  # [n, sum of all ranks]
        self._by_site: Sequence[Tensor] = ()  # views of it, [n, R] per site
        self.logit_rows: Tensor | None = None  # int64 [L]: the rows that the head gets
        self.active = False  # whether experts act on any row of this forward

    def set(self, scalings: Tensor, first_row: int) -> Tensor | None:
        """Sets the scalings [n, S, E] of rows first_row .. first_row + n; n = 0 switches the experts off. Returns the
        expanded ones [n, sum of all ranks].
        """
        if not scalings.shape[0]:
            self.clear()
            return None
        if self.global_scaling_weight != 1.0:
            scalings = scalings * self.global_scaling_weight
        return self.open(scalings.to(self.dtype).flatten(1).index_select(1, self.rank_index), first_row)

    def open(self, spread: Tensor, first_row: int) -> Tensor:
        """Sets expanded scalings [n, sum of all ranks]."""
        self.first_row, self.active, self._spread, self._by_site = first_row, True, spread, ()
        return spread

    def clear(self) -> None:
        """Switches the experts off, and drops the state of a forward."""
        self.active, self._spread, self._by_site, self.logit_rows = False, None, (), None

    def at(self, site: int) -> Tensor:
        """Returns [n, R]: the scaling of every rank of the site's stack, for rows first_row .. first_row + n."""
        if not self._by_site:
            assert self._spread is not None, "no scalings are set"
            self._by_site = self._spread.split_with_sizes(self._sizes, 1)
        return self._by_site[site]

    def offset(self, site: int) -> int:
        """The index of a site's first rank among all ranks."""
        return self._offsets[site]
