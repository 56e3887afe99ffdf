"""Manifest: the parts of a checkpoint in any layout. Reads it from bundle.json, and reads mistral.rs's ordering file,
`{"order": [expert names], "layers": {site: number}, "base_model_id": ...}`.

Knows keys and types (DESIGN section 5); opens no other file. layouts.py reads the other layouts, and chooses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from service.checkpoint.defects import Defects, defect, did_you_mean
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import TensorFile

FORMAT_VERSION = 1
FILE_NAME = "bundle.json"
GATE_FOLDER, GATE_CONFIG, GATE_WEIGHTS = "classifier", "xlora_config.json", "xlora_classifier.safetensors"
KEYS = ("format_version", "name", "base", "experts", "classifier", "sites", "sha256", "gate_profile", "draft_head")
EXPERT_KEYS = ("name", "path", "description")
MAX_EXPERTS, MAX_FILES = 1000, 10_000
HALF_OF_PAIR = re.compile("[\ud800-\udfff]")
SHA256 = re.compile(r"[0-9a-f]{64}")
IGNORED_KEYS = ("base_model_id", "preload_adapters")


@dataclass(frozen=True, slots=True)
class ExpertEntry:
    """One expert as bundle.json lists it."""

    name: str
    path: str
    description: str


@dataclass(frozen=True, slots=True)
class GateFiles:
    """The places of the gate's two files, and the naming of the classifier's tensors in them."""

    folder: str  # relative to the checkpoint
    experts: int  # E
    config: str
    weights: str
    peft_names: bool = False  # PEFT's instead of the original library's
    loss_hint: str | None = None  # PEFT: what to do when tensors are missing
    moved: Mapping[str, tuple[TensorFile, str]] = field(default_factory=dict)  # tensors to take from other files
    relu: bool | None = True  # the default of enable_relu_and_dropout, if names do not show it; None: no default

    def names_in(self, file: TensorFile) -> list[str]:
        """Names of the classifier's tensors, moved ones included."""
        return [*file.tensors, *self.moved]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Names, places and orders of a checkpoint's parts, checked for types. Paths are as written in the file."""

    layout: str  # bundle, PEFT or original
    source: Path  # the file that it was read from
    name: str
    base: str | None  # None: not stated in the layout's files
    experts: tuple[ExpertEntry, ...]  # class order; the readable ones
    expert_count: int  # E, as listed
    gate: GateFiles
    sites: tuple[str, ...] | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    gate_profile: dict[str, Any] | None = None
    draft_head: str | None = None  # its folder


def read_bundle_manifest(root: BundleRoot, defects: Defects) -> Manifest:
    """Reads and checks bundle.json. Defective experts, sites and hashes are reported and left out."""
    source = root.path / FILE_NAME
    data = root.json(source, "a bundle is a folder with bundle.json, base/, experts/ and classifier/")
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise defect(source, f"format_version: expected {FORMAT_VERSION}, found {version!r:.80}")
    for key in data:
        if key not in KEYS:
            defects.add(defect(source, f"unknown config key {key!r}", did_you_mean(key, KEYS)))
    profile = data.get("gate_profile")
    if profile is not None and not (isinstance(profile, dict) and _is_portable(profile)):
        expected = "expected an object of text and numbers, or null"
        defects.add(defect(source, f"gate_profile: {expected}, found {profile!r:.80}"))
    classifier = _text({"classifier": GATE_FOLDER, **data}, "classifier", source)
    return Manifest(
        layout="bundle",
        source=source,
        name=_text(data, "name", source),
        base=_text(data, "base", source),
        experts=_experts(data.get("experts"), source, defects),
        expert_count=len(data["experts"]),
        gate=GateFiles(classifier, len(data["experts"]), GATE_CONFIG, GATE_WEIGHTS),
        sites=_sites(data.get("sites"), source, defects),
        sha256=_hashes(data.get("sha256"), source, defects),
        gate_profile=profile if isinstance(profile, dict) else None,
        draft_head=None if data.get("draft_head") is None else _text(data, "draft_head", source),
    )


def _text(data: Mapping[str, Any], key: str, source: Path, where: str = "") -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        found = f"found {value!r:.80}" if key in data else "it is missing"
        raise defect(source, f"{where}{key}: expected a non-empty string, {found}")
    return value


def _is_portable(value: Any) -> bool:
    """Whether a JSON value can be sent to other processes and to callers: without half surrogate pairs, and without
    integers of more than 64 bits.
    """
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            pending += [*part, *part.values()]
        elif isinstance(part, list):
            pending += part
        elif (isinstance(part, int) and not -(2**63) <= part < 2**63) or (
            isinstance(part, str) and HALF_OF_PAIR.search(part)
        ):
            return False
    return True


def _experts(entries: Any, source: Path, defects: Defects) -> tuple[ExpertEntry, ...]:
    if not isinstance(entries, list) or not entries:
        raise defect(source, f"experts: expected a list of at least one expert, found {entries!r:.80}")
    experts: dict[str, ExpertEntry] = {}
    for index, entry in enumerate(entries):
        with defects.guard():
            expert = _expert(entry, f"experts[{index}]", source)
            if expert.name in experts:
                raise defect(source, f"experts[{index}].name: {expert.name!r} is already taken; names must differ")
            experts[expert.name] = expert
    return tuple(experts.values())


def _expert(entry: Any, where: str, source: Path) -> ExpertEntry:
    if not isinstance(entry, dict):
        raise defect(source, f"{where}: expected an object with name and path, found {entry!r:.80}")
    for key in entry:
        if key not in EXPERT_KEYS:
            raise defect(source, f"{where}: unknown config key {key!r}", did_you_mean(key, EXPERT_KEYS))
    description = entry.get("description", "")
    if not isinstance(description, str) or not _is_portable(description):
        raise defect(source, f"{where}.description: expected a string, found {description!r:.80}")
    name, path = (_text(entry, key, source, f"{where}.") for key in ("name", "path"))
    return ExpertEntry(name, path, description)


def _sites(sites: Any, source: Path, defects: Defects) -> tuple[str, ...] | None:
    if sites is None:
        return None
    if not isinstance(sites, list) or not sites or not all(isinstance(site, str) for site in sites):
        defects.add(defect(source, f"sites: expected a list of module names, found {sites!r:.80}"))
        return None
    repeated, times = Counter(sites).most_common(1)[0]
    if times > 1:
        defects.add(defect(source, f"sites: {repeated!r} is listed {times} times, expected once"))
    return tuple(dict.fromkeys(sites))


def _hashes(hashes: Any, source: Path, defects: Defects) -> dict[str, str]:
    if hashes is None:
        return {}
    if not isinstance(hashes, dict):
        defects.add(defect(source, f"sha256: expected an object, found {hashes!r:.80}"))
        return {}
    if len(hashes) > MAX_FILES:
        defects.add(defect(source, f"sha256: expected at most {MAX_FILES:,} files, found {len(hashes):,}"))
        return {}
    good: dict[str, str] = {}
    for file, value in hashes.items():
        if not file.isprintable() or not file.strip():
            defects.add(defect(source, f"sha256: expected file names, found {file!r:.80}"))
        elif isinstance(value, str) and SHA256.fullmatch(value.lower()):
            good[file] = value.lower()
        else:
            defects.add(defect(source, f"sha256[{file!r}]: expected 64 hexadecimal digits, found {value!r:.80}"))
    return good


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
