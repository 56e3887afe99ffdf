"""mistral.rs's ordering file: `{"order": [expert names], "layers": {site: number}, "base_model_id": ...}`.

Knows its keys and what they replace in a Manifest: class order and site order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from service.checkpoint.defects import defect, did_you_mean
from service.checkpoint.formats.manifest import Manifest
from service.checkpoint.weights.files import BundleRoot

IGNORED_KEYS = ("base_model_id", "preload_adapters")


@dataclass(frozen=True, slots=True)
class Ordering:
    """Class order and site order; None where the file leaves one out."""

    source: Path
    experts: tuple[str, ...] | None
    sites: tuple[str, ...] | None

    def apply(self, manifest: Manifest) -> Manifest:
        """`manifest` in this order. Raises CheckpointError when the expert names are not the manifest's."""
        if self.experts is None:
            return replace(manifest, sites=self.sites or manifest.sites)
        entries = {entry.name: entry for entry in manifest.experts}
        for name in self.experts:
            if name not in entries:
                hint = did_you_mean(name, entries) or f"the experts are {', '.join(entries)}"
                raise defect(self.source, f"order: the checkpoint has no expert {name!r}", hint)
        for name in entries:
            if name not in self.experts:
                raise defect(self.source, f"order: expected expert {name!r}, which the checkpoint has")
        return replace(
            manifest, experts=tuple(entries[name] for name in self.experts), sites=self.sites or manifest.sites
        )


def read_ordering(path: Path) -> Ordering:
    """Read and check the file at `path`. Raises CheckpointError for wrong types, repeated names and holes."""
    data = BundleRoot(path.parent).json(path, "--ordering names a JSON file as mistral.rs has it")
    for key in data:
        if key not in ("order", "layers", *IGNORED_KEYS):
            raise defect(path, f"unknown key {key!r}", did_you_mean(key, ("order", "layers")))
    order, layers = data.get("order"), data.get("layers")
    if order is not None:
        valid = isinstance(order, list) and order and all(isinstance(name, str) for name in order)
        if not valid or len(set(order)) < len(order):
            raise defect(path, f"order: expected a list of different expert names, found {order!r:.80}")
    if layers is None:
        return Ordering(path, tuple(order) if order else None, None)
    if not isinstance(layers, dict) or sorted(layers.values(), key=str) != sorted(range(len(layers)), key=str):
        problem = "layers: expected an object that maps each module to another number from 0 on"
        raise defect(path, f"{problem}, found {layers!r:.80}")
    return Ordering(path, tuple(order) if order else None, tuple(sorted(layers, key=lambda site: int(layers[site]))))
