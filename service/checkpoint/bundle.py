"""A bundle on disk -> Checkpoint: the order in which its parts are read and checked.

Knows how the parts depend on each other; what each part looks like is in manifest, base, lora, config and classifier.
The base's weights are hashed and checked here but never kept. `load_checkpoint` stops at the first defect;
`report.find_problems` walks the same code to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from service.checkpoint import classifier as classifier_format
from service.checkpoint import lora
from service.checkpoint.base import BaseModel, read_base
from service.checkpoint.classifier import ClassifierWeights, read_classifier
from service.checkpoint.config import XLoraConfig
from service.checkpoint.defects import Defects, defect, did_you_mean
from service.checkpoint.files import BundleRoot
from service.checkpoint.hashes import WeightFile, WeightHasher
from service.checkpoint.lora import LoraWeights
from service.checkpoint.manifest import ExpertEntry, Manifest, read_manifest
from service.checkpoint.tensors import read_header

__all__ = ["Checkpoint", "ClassifierWeights", "Expert", "LoraWeights", "WeightFile", "load_checkpoint", "read_bundle"]


@dataclass(frozen=True)
class Expert:
    """One LoRA expert: its weights at every site it targets."""

    name: str
    description: str
    weights: dict[str, LoraWeights]  # site -> weights
    config: Mapping[str, Any] = field(default_factory=dict)  # adapter_config.json as it is on disk


@dataclass(frozen=True)
class Checkpoint:
    """Everything a bundle holds except the base's weights, which `base_path` points to."""

    name: str
    path: Path
    base_path: Path
    experts: tuple[Expert, ...]  # class order
    sites: tuple[str, ...] | None  # traversal order; None when the bundle has none: the model then decides
    xlora: XLoraConfig
    classifier: ClassifierWeights
    gate_profile: dict[str, Any] | None
    weights_sha256: str  # over the hashes of all weight files, sorted by label
    weight_files: tuple[WeightFile, ...] = ()

    @property
    def tokenizer_path(self) -> Path:
        """The fast tokenizer's file; it exists."""
        return self.base_path / "tokenizer.json"


def load_checkpoint(
    path: Path,
    *,
    allow_outside: bool = False,
    verify_hashes: bool = True,
    on_progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Read and check the bundle at `path`. Raises CheckpointError for the first defect.

    `verify_hashes=False` trusts the hashes in bundle.json: the base's weights are then not read at all, so NaN in them
    is not found. `allow_outside` lets base, experts and files lie outside the bundle. `on_progress` receives one line
    per weight file.
    """
    root = BundleRoot(Path(path), allow_outside)
    checkpoint, defects = None, Defects()
    with defects.guard():
        checkpoint = read_bundle(root, defects, verify_hashes=verify_hashes, on_progress=on_progress)
    if checkpoint is None:
        raise defect(path, "the bundle could not be read")
    return checkpoint


def read_bundle(
    root: BundleRoot,
    defects: Defects,
    *,
    verify_hashes: bool = True,
    on_progress: Callable[[str], None] | None = None,
) -> Checkpoint | None:
    """Walk the whole bundle; None when `defects` collected something that leaves no Checkpoint."""
    manifest = read_manifest(root, defects)
    hasher = WeightHasher(root, manifest, defects, verify_hashes, on_progress or (lambda line: None))
    base: BaseModel | None = None
    with defects.guard():
        base = read_base(root, root.folder(manifest.base, manifest.source, "base"), defects)
        for file in base.files:
            hasher.add(f"base/{file.path.name}", file, trust_recorded=True)
    known_base = base if base is not None and base.complete else None
    experts: list[Expert] = []
    for entry in manifest.experts:
        with defects.guard():
            experts.append(_read_expert(root, manifest, entry, known_base, hasher, defects))
    gate: tuple[XLoraConfig, ClassifierWeights | None] | None = None
    with defects.guard():
        gate = _read_gate(root, manifest, base, _check_sites(manifest, experts, defects), hasher, defects)
    hasher.check_remaining()
    if defects.errors or base is None or gate is None or gate[1] is None:
        return None
    return Checkpoint(
        name=manifest.name,
        path=root.path,
        base_path=base.path,
        experts=tuple(experts),
        sites=manifest.sites,
        xlora=gate[0],
        classifier=gate[1],
        gate_profile=manifest.gate_profile,
        weights_sha256=hasher.combined(),
        weight_files=tuple(hasher.files),
    )


def _read_expert(
    root: BundleRoot,
    manifest: Manifest,
    entry: ExpertEntry,
    base: BaseModel | None,
    hasher: WeightHasher,
    defects: Defects,
) -> Expert:
    folder = root.folder(entry.path, manifest.source, f"expert {entry.name!r}")
    source = folder / lora.CONFIG_FILE
    config = root.json(source, f"the expert {entry.name!r} must be a PEFT LoRA adapter")
    errors_before = len(defects.errors)
    lora.check_adapter_config(config, source, defects)
    file = read_header(root.weights(folder, lora.WEIGHTS_FILE))
    weights: dict[str, LoraWeights] = {}
    if len(defects.errors) == errors_before:
        weights = lora.read_lora_weights(file, config, source, base, defects)
    if len(defects.errors) > errors_before:
        weights = {}  # what the sites should be is then unknown
    hasher.add(f"experts/{entry.name}/{file.path.name}", file)
    return Expert(entry.name, entry.description, weights, config)


def _read_gate(
    root: BundleRoot,
    manifest: Manifest,
    base: BaseModel | None,
    sites: int | None,
    hasher: WeightHasher,
    defects: Defects,
) -> tuple[XLoraConfig, ClassifierWeights | None]:
    folder = root.folder(manifest.classifier, manifest.source, "classifier")
    xlora = _read_xlora_config(root, folder, manifest, base, defects)
    file = read_header(root.weights(folder, classifier_format.WEIGHTS_FILE))
    hasher.add(f"classifier/{file.path.name}", file)
    return xlora, read_classifier(file, xlora, sites=sites, experts=manifest.expert_count, defects=defects)


def _read_xlora_config(
    root: BundleRoot, folder: Path, manifest: Manifest, base: BaseModel | None, defects: Defects
) -> XLoraConfig:
    source = folder / classifier_format.CONFIG_FILE
    config = XLoraConfig.from_dict(root.json(source), source)
    if base is not None and base.hidden_size not in (None, config.hidden_size):
        problem = f"hidden_size: expected {base.hidden_size} as in {base.path / 'config.json'}"
        defects.add(defect(source, f"{problem}, found {config.hidden_size}"))
        config = replace(config, hidden_size=base.hidden_size or config.hidden_size)  # for the classifier's shapes
    experts = manifest.expert_count
    if config.top_k_lora is not None and config.top_k_lora > experts:
        problem = f"top_k_lora: expected at most {experts}, the number of experts, found {config.top_k_lora}"
        defects.add(defect(source, problem))
    return config


def _check_sites(manifest: Manifest, experts: list[Expert], defects: Defects) -> int | None:
    """Every site has an expert and every expert's target is a site; returns S, or None when it is not certain."""
    if len(experts) < manifest.expert_count or not all(expert.weights for expert in experts):
        return None
    targeted = {site: expert.name for expert in experts for site in expert.weights}
    if manifest.sites is None:
        return len(targeted)
    errors_before = len(defects.errors)
    for site in manifest.sites:
        if site not in targeted:
            hint = did_you_mean(site, targeted)
            defects.add(defect(manifest.source, f"sites: no expert targets {site!r}", hint))
    for site, name in targeted.items():
        if site not in manifest.sites:
            hint = did_you_mean(site, manifest.sites)
            defects.add(defect(manifest.source, f"sites: expected {site!r}, which expert {name!r} targets", hint))
    return len(manifest.sites) if len(defects.errors) == errors_before else None
