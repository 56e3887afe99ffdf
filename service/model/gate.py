"""The gate of the forward under way: which weight every expert has, per row and per site.

An `nn.Linear` receives only x, so the adapted linears read their scalings from the one Gate their model owns.
The Gate does not compute scalings (classifier.py does) and does not store them between forwards (kv_cache.py does).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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
        self.dtype = dtype  # of the arithmetic
        index: list[int] = []
        for site, site_ranks in enumerate(ranks):
            for expert, rank in enumerate(site_ranks):
                index += [(site if layerwise else 0) * len(site_ranks) + expert] * rank
        self._sizes = [sum(site_ranks) for site_ranks in ranks]  # R of each site
        self._offsets = [0, *accumulate(self._sizes)]  # of each site in all ranks
        self.rank_index = torch.tensor(index, device=device)  # int64 [sum of all ranks], into a flattened [S, E] row
        self._spread: Tensor | None = None  # [n, sum of all ranks]
        self._by_site: Sequence[Tensor] = ()  # its parts [n, R]
        self.logit_rows: Tensor | None = None  # int64 [L]: the rows that the head sees
        self.active = False  # whether experts act on any row of this forward

    def set(self, scalings: Tensor, first_row: int) -> Tensor | None:
        """Sets the scalings [n, S, E] of rows first_row .. first_row + n; n = 0 switches the experts off. Returns them
        at every rank [n, sum of all ranks].
        """
        if not scalings.shape[0]:
            self.clear()
            return None
        if self.global_scaling_weight != 1.0:
            scalings = scalings * self.global_scaling_weight
        return self.open(scalings.to(self.dtype).flatten(1).index_select(1, self.rank_index), first_row)

    def open(self, spread: Tensor, first_row: int) -> Tensor:
        """The same with scalings that are spread already [n, sum of all ranks]."""
        self.first_row, self.active, self._spread, self._by_site = first_row, True, spread, ()
        return spread

    def clear(self) -> None:
        """Switches the experts off and forgets what belongs to one forward."""
        self.active, self._spread, self._by_site, self.logit_rows = False, None, (), None

    def at(self, site: int) -> Tensor:
        """Returns [n, R]: the scaling of every rank of the site's stack, for rows first_row .. first_row + n."""
        if not self._by_site:
            assert self._spread is not None, "no scalings are set"
            self._by_site = self._spread.split_with_sizes(self._sizes, 1)
        return self._by_site[site]

    def offset(self, site: int) -> int:
        """Where the ranks of a site's stack begin among all ranks."""
        return self._offsets[site]
