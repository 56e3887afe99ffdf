"""The original X-LoRA library's save -> Manifest: xlora_config.json, xlora_classifier.safetensors, a folder per expert.

Knows `adapters` as the list that the library writes and as the map that its users write. A map's order is its file's.
Before 2024-02-23 the library saved the experts in a folder `adapters` of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.checkpoint.defects import defect
from service.checkpoint.formats.manifest import ExpertEntry, Manifest
from service.checkpoint.formats.ordering import Ordering
from service.checkpoint.weights.classifier import WEIGHTS_FILE, GateFiles
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.lora import CONFIG_FILE

FILE_NAME = "xlora_config.json"
EARLY_FOLDER = "adapters"


def read_original_manifest(root: BundleRoot, ordering: Ordering | None) -> Manifest:
    """The manifest in class order: that of `adapters`, or of `ordering`, which can also stand in for a missing list."""
    source = root.path / FILE_NAME
    data = root.json(source)
    adapters = data.get("adapters")
    if adapters is None and ordering is not None and ordering.experts is not None:
        adapters = list(ordering.experts)
    entries = _experts(root, adapters, source)
    base = data.get("base_model_id")
    found = Manifest(
        layout="original",
        source=source,
        name=root.name,
        base=base if isinstance(base, str) and base else None,
        experts=entries,
        expert_count=len(entries),
        gate=GateFiles(".", len(entries), FILE_NAME, WEIGHTS_FILE, relu=None),  # its default was false, then true
    )
    return ordering.apply(found) if ordering else found


def _experts(root: BundleRoot, adapters: Any, source: Path) -> tuple[ExpertEntry, ...]:
    """The experts in class order. A saved one comes before the one that `adapters` names: that is older."""
    places = dict.fromkeys(adapters) if isinstance(adapters, list) else adapters
    valid = isinstance(places, dict) and places and len(places) == len(adapters)
    if not valid or not all(isinstance(name, str) and name and name.isprintable() for name in places):
        problem = f"adapters: expected a list of names or a map from names to folders, found {adapters!r:.80}"
        raise defect(source, problem, "their order is the class order; give it with --ordering and its key 'order'")
    entries = []
    for name, place in places.items():
        stated = place if isinstance(place, str) else name
        entries.append(ExpertEntry(name, _saved_place(root, name) or stated, ""))
    return tuple(entries)


def _saved_place(root: BundleRoot, name: str) -> str | None:
    """Where the expert lies that was saved with the classifier. Where a later save went into an early one's folder, so
    that both places are there, the classifier is the later one's: so is the expert. PEFT saves "default" without a
    folder of its own.
    """
    own = [name, "."] if name == "default" else [name]
    early = [EARLY_FOLDER if place == "." else f"{EARLY_FOLDER}/{place}" for place in own]
    return next((place for place in (*own, *early) if (root.path / place / CONFIG_FILE).exists()), None)
