"""Which part of the gate's rows a caller sees, in what grouping, and what the rows say in a few numbers.

This file knows arrays and the names of sites and experts; it knows no HTTP and no tokens.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.api.gate_views.rows import FloatArray, Rows
from service.api.schemas.bodies import ScalingsBody, Select
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError

Array = npt.NDArray[np.float64]

_SHOWN_CHARACTERS = 60
_LAYER = re.compile(r"((?:.*?\.)?(\d+))\.")


@dataclass(frozen=True, slots=True)
class View:
    """The caller's choice of positions, sites (S of them) and experts (E), in the model's order."""

    start: int
    stop: int | None
    sites: list[int]
    site_names: list[str]  # of `sites`
    all_sites: bool
    experts: list[int]
    expert_names: list[str]  # of `experts`
    granularity: str
    full: bool  # whether the answer has every site's weights

    @classmethod
    def of(cls, body: ScalingsBody, info: EngineInfo) -> View:
        """Raises InvalidRequestError for names and numbers that the model has not."""
        select = body.select or Select.model_validate({})
        names = [expert["name"] for expert in info.experts]
        sites = _sites(select, info.sites)
        experts = _chosen(select.experts, names, "experts")
        return cls(
            start=select.start or 0,
            stop=select.stop,
            sites=sites,
            site_names=[info.sites[index] for index in sites],
            all_sites=len(sites) == len(info.sites),
            experts=experts,
            expert_names=[names[index] for index in experts],
            granularity=body.granularity or "token",
            full=body.return_scalings == "full",
        )

    @property
    def needs_sites(self) -> bool:
        """Whether means over all sites are not enough."""
        return self.full or self.granularity != "token" or not self.all_sites

    def groups(self) -> dict[str, list[int]]:
        """The selected sites of each group, as indices into `sites`; granularities other than token have them."""
        name_of = _NAME_OF[self.granularity]
        groups: dict[str, list[int]] = {}
        for index, site in enumerate(self.site_names):
            groups.setdefault(name_of(site), []).append(index)
        return groups

    def positions(self, tokens: int) -> range:
        """The selected positions of a text. Raises InvalidRequestError when there is none."""
        if self.start >= tokens:
            raise InvalidRequestError(
                f"select.start is {self.start}; the text has {tokens} tokens",
                param="select.start",
                hint=f"positions 0 to {tokens - 1} can be the first",
            )
        return range(self.start, tokens if self.stop is None else min(self.stop, tokens))

    def seen(self, rows: Rows) -> Rows:
        """The selected sites' rows, of all experts."""
        return rows if self.all_sites else over_sites(rows, self.sites)

    def columns(self, rows: Rows) -> Rows:
        """The selected experts' weights; the entropy stays that of all."""
        full = None if rows.full is None or not self.full else rows.full[:, :, self.experts]
        return Rows(rows.start, rows.mean[:, self.experts], rows.entropy, full)


@dataclass(frozen=True, slots=True)
class Summary:
    """Some rows in a few numbers."""

    mean: Array  # [E], over the positions
    entropy: float  # nats, mean over the positions whose rows are not all-zero; NaN where there is none
    top1: Array  # [E], share of the positions at which the expert has the largest mean weight, the first of equals


def summarise(rows: Rows) -> Summary:
    """Over all positions of `rows`, of which there is one at least."""
    leads = np.bincount(rows.mean.argmax(axis=1), minlength=rows.mean.shape[1])
    known = rows.entropy[np.isfinite(rows.entropy)]
    entropy = float(known.mean(dtype=np.float64)) if len(known) else np.nan
    return Summary(rows.mean.mean(axis=0, dtype=np.float64), entropy, leads / len(rows.mean))


def over_sites(rows: Rows, sites: Sequence[int]) -> Rows:
    """Some sites alone: their weights, and mean and entropy over them (DESIGN section 2). `rows` must be full."""
    assert rows.full is not None
    full = rows.full[:, sites]
    return Rows(rows.start, full.mean(axis=1, dtype=np.float64).astype(np.float32), _entropy(full), full)


def _entropy(full: FloatArray) -> FloatArray:
    """[positions, S, E] -> [positions]: nats, mean over the sites that act; NaN where none does."""
    size = np.abs(full.astype(np.float64))
    total = size.sum(axis=-1, keepdims=True)
    acting = total[..., 0] > 0
    p = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    nats = -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(axis=-1).sum(axis=-1)  # [positions]
    count = acting.sum(axis=-1)
    mean = np.full(len(full), np.nan)
    np.divide(nats, count, out=mean, where=count > 0)
    return mean.astype(np.float32)


def shares(rows: Rows) -> Array:
    """[E]: mean over the positions of p = |w| / sum |w|, w being the position's mean weights; NaN where all are 0."""
    size = np.abs(rows.mean.astype(np.float64))
    total = size.sum(axis=1, keepdims=True)
    acting = total[:, 0] > 0
    if not acting.any():
        return np.full(size.shape[1], np.nan)
    found: Array = (size[acting] / total[acting]).mean(axis=0)
    return found


def divergence(p: Array, q: Array) -> float:
    """Jensen-Shannon divergence of two distributions [E], nats: H((p + q) / 2) - (H(p) + H(q)) / 2, 0 to ln 2."""
    nats = _nats((p + q) / 2) - (_nats(p) + _nats(q)) / 2
    return nats if np.isnan(nats) else min(max(nats, 0.0), float(np.log(2)))


def _nats(p: Array) -> float:
    return float(-(p * np.log(np.where(p == 0, 1.0, p))).sum())  # NaN stays NaN


def layer_name(site: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.3; a site outside any layer is a group of its own."""
    match = _LAYER.match(site)
    return site if match is None else match[1]


def layer_number(site: str) -> int | None:
    """model.layers.3.mlp.experts.0.up_proj -> 3; None outside any layer."""
    match = _LAYER.match(site)
    return None if match is None else int(match[2])


def module_type(site: str) -> str:
    """model.layers.3.mlp.up_proj -> up_proj."""
    return site.rpartition(".")[2]


def _itself(site: str) -> str:
    return site


_NAME_OF = {"site": _itself, "layer": layer_name, "module_type": module_type}


def _sites(select: Select, names: Sequence[str]) -> list[int]:
    """Indices of the sites that satisfy every list."""
    chosen = set(_chosen(select.sites, names, "sites"))
    types = list(dict.fromkeys(map(module_type, names)))
    wanted_types = {types[index] for index in _chosen(select.module_types, types, "module_types")}
    wanted_layers = None if select.layers is None else set(select.layers)
    layers = sorted({number for name in names if (number := layer_number(name)) is not None})
    unknown = min((wanted_layers or set()) - set(layers), default=None)
    if unknown is not None:
        known = f"layers with sites: {', '.join(map(str, layers))}" if layers else "no site is in a layer"
        raise InvalidRequestError(f"no site is in layer {unknown}", param="select.layers", hint=known)
    sites = [
        index
        for index, name in enumerate(names)
        if index in chosen
        and module_type(name) in wanted_types
        and (wanted_layers is None or layer_number(name) in wanted_layers)
    ]
    if not sites:
        raise InvalidRequestError(
            "no site satisfies select.sites, select.layers and select.module_types together",
            param="select",
            hint="leave one of them out",
        )
    return sites


def _chosen(wanted: Sequence[str] | None, names: Sequence[str], field: str) -> list[int]:
    """Indices of the wanted names in the model's order; all where nothing is wanted in particular."""
    if wanted is None:
        return list(range(len(names)))
    known, asked = set(names), set(wanted)
    unknown = next((name for name in wanted if name not in known), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown[:_SHOWN_CHARACTERS], names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the first ones are {', '.join(names[:8])}; GET /info has all"
        raise InvalidRequestError(f"no such name: {unknown[:_SHOWN_CHARACTERS]!r}", param=f"select.{field}", hint=hint)
    return [index for index, name in enumerate(names) if name in asked]
