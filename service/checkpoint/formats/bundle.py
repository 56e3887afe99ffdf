"""Reads a checkpoint of any layout into a Checkpoint: its parts in their order, and the checks between them.

Knows how the parts depend on each other; the parts themselves are read by layouts, base, lora, config and classifier.
Weights of the base and of experts stay in their files until they are needed. `load_checkpoint` stops at the first
defect; `report.find_problems` runs the same code to the end.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from service.checkpoint.base import BaseModel, read_base
from service.checkpoint.config import XLoraConfig
from service.checkpoint.defects import Defects, defect, did_you_mean
from service.checkpoint.formats.layouts import read_manifest
from service.checkpoint.formats.manifest import MAX_EXPERTS, ExpertEntry, Manifest, read_ordering
from service.checkpoint.sources import Locator, Overrides, is_hub_id, locate_model, same_repository
from service.checkpoint.weights import lora
from service.checkpoint.weights.classifier import ClassifierWeights, OpenGate, open_gate, read_classifier
from service.checkpoint.weights.draft_head import WEIGHTS_FILE as DRAFT_HEAD_FILE
from service.checkpoint.weights.draft_head import DraftHeadWeights, read_draft_head
from service.checkpoint.weights.draft_layer import WEIGHTS_FILE as DRAFT_LAYER_FILE
from service.checkpoint.weights.draft_layer import AttentionShape, DraftLayerWeights, read_draft_layer
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.lora import LoraWeights
from service.checkpoint.weights.tensors import DTYPES, StoredTensor, TensorFile, read_header
from service.checkpoint.weights.weight_files import WeightFile, WeightFiles

NO_OVERRIDES = Overrides()
InspectBase = Callable[[BaseModel], Any]


@dataclass(frozen=True)
class Expert:
    """One LoRA expert: its weights at every site it targets."""

    name: str
    description: str
    weights: dict[str, LoraWeights]  # site -> weights
    config: Mapping[str, Any] = field(default_factory=dict)  # adapter_config.json as it is on disk
    folder: Path = Path()


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
    draft_head: DraftHeadWeights | None
    weights_sha256: str | None  # over the hashes of all weight files, sorted by label; None: not known yet
    draft_layer: DraftLayerWeights | None = None
    weight_files: tuple[WeightFile, ...] = ()  # as examined; empty: not examined
    files: WeightFiles | None = None
    base_reference: str = ""  # the base as a hub id or an absolute path
    eos_token_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()  # oddities of the files that are no defects
    skeleton: Any = None  # the result of inspect_base
    base_files: tuple[TensorFile, ...] = ()  # headers of the base's weight files
    layout: str = "bundle"  # the layout it was read from; only descriptions may depend on it

    @property
    def base_tensors(self) -> dict[str, StoredTensor]:
        """The base's tensors, each of which is read when it is indexed."""
        return {name: StoredTensor(file, info) for file in self.base_files for name, info in file.tensors.items()}

    @property
    def base_dtypes(self) -> set[torch.dtype]:
        """The dtypes of the base's tensors in their files, whatever config.json states."""
        return {DTYPES[info.dtype] for file in self.base_files for info in file.tensors.values()}

    @property
    def tokenizer_path(self) -> Path:
        """The fast tokenizer's file; it exists."""
        return self.base_path / "tokenizer.json"


def load_checkpoint(
    path: Path | str,
    *,
    overrides: Overrides = NO_OVERRIDES,
    allow_outside: bool = False,
    examine_weights: bool = True,
    inspect_base: InspectBase | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Read and check the checkpoint at `path`, a folder or a hub id. Raises CheckpointError for the first defect.

    `examine_weights` compares every weight file with its hash in bundle.json and looks for NaN in it. Without, the
    weights of the base and of experts are not read; NaN is found when they are, and `files.verifying()` compares.
    `allow_outside` lets base, experts and files lie outside the folder; what `overrides` names may lie anywhere.
    `inspect_base` raises CheckpointError for what this package cannot know of a base (skeleton.py); it is called before
    any weights are read, and what it returns is kept as the checkpoint's `skeleton`. `on_progress` receives one line
    per weight file, and lines while files are downloaded.
    """
    checkpoint, defects = None, Defects()
    with defects.guard():
        checkpoint = read_checkpoint(
            path,
            overrides,
            defects,
            allow_outside=allow_outside,
            examine_weights=examine_weights,
            inspect_base=inspect_base,
            on_progress=on_progress,
        )
    if checkpoint is None:
        raise defect(path, "the checkpoint could not be read")
    return checkpoint


@contextmanager
def _no_collections() -> Iterator[None]:
    """Disables garbage collection: a header becomes millions of live objects, and traversing them takes longest."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_collections()
def read_checkpoint(
    path: Path | str,
    overrides: Overrides,
    defects: Defects,
    *,
    allow_outside: bool = False,
    examine_weights: bool = True,
    inspect_base: InspectBase | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Checkpoint | None:
    """Reads and checks the whole checkpoint; None if `defects` has collected any."""
    progress = on_progress or (lambda line: None)
    root = BundleRoot(locate_model(path, progress), allow_outside)
    ordering = read_ordering(overrides.ordering) if overrides.ordering else None
    manifest = read_manifest(root, ordering, defects, rescue=overrides.rescue)
    if manifest.expert_count > MAX_EXPERTS:
        raise defect(manifest.source, f"expected at most {MAX_EXPERTS:,} experts, found {manifest.expert_count:,}")
    locator = Locator(root, overrides, progress)
    locator.check_names([entry.name for entry in manifest.experts], manifest.source)
    files = WeightFiles(root, manifest.sha256, manifest.source)
    base, base_reference, skeleton = _read_base(locator, manifest, files, inspect_base, defects)
    gate: OpenGate | None = None
    with defects.guard():
        gate = open_gate(root, manifest, base, files, overrides.gate_relu, defects)
    experts = _read_experts(locator, manifest, base, files, defects)
    if overrides.base is None:
        _check_base_names(manifest, experts, defects)
    draft_head, draft_layer = _read_drafts(root, manifest, base, files, defects)
    classifier: ClassifierWeights | None = None
    with defects.guard():
        sites = _check_sites(manifest, experts, defects)
        if gate is not None:
            classifier = read_classifier(gate.file, gate.config, gate.prefixes, manifest.gate, sites, defects)
    for warning in defects.warnings:
        progress(f"warning: {warning}")
    examined = files.examine(defects, progress) if examine_weights else []
    if defects.errors or base is None or gate is None or classifier is None:
        return None
    return Checkpoint(
        name=manifest.name,
        path=root.path,
        base_path=base.path,
        experts=tuple(experts),
        sites=manifest.sites,
        xlora=gate.config,
        classifier=classifier,
        gate_profile=manifest.gate_profile,
        draft_head=draft_head,
        draft_layer=draft_layer,
        weights_sha256=files.combined(examined) if examine_weights else files.stated,
        weight_files=tuple(examined),
        files=files,
        layout=manifest.layout,
        base_reference=base_reference,
        eos_token_ids=base.eos_token_ids,
        warnings=tuple(defects.warnings),
        skeleton=skeleton,
        base_files=base.files,
    )


def _read_base(
    locator: Locator, manifest: Manifest, files: WeightFiles, inspect_base: InspectBase | None, defects: Defects
) -> tuple[BaseModel | None, str, Any]:
    """The base, None where it has defects; its reference for others; and its skeleton, if it can be inspected."""
    base: BaseModel | None = None
    skeleton: Any = None
    reference, errors_before = "", len(defects.errors)
    with defects.guard():
        folder, reference = locator.base(manifest.base, manifest.source)
        base = read_base(locator.root, folder, defects, eos_from_tokenizer=locator.overrides.eos_from_tokenizer)
        for file in base.files:
            files.add(f"base/{file.path.name}", file)
        if inspect_base is not None and base.complete and len(defects.errors) == errors_before:
            skeleton = inspect_base(base)
    return base, reference, skeleton


def _read_experts(
    locator: Locator, manifest: Manifest, base: BaseModel | None, files: WeightFiles, defects: Defects
) -> list[Expert]:
    """The experts that can be read, in class order. Shapes are compared with a base that is complete."""
    known_base = base if base is not None and base.complete else None
    experts: list[Expert] = []
    for entry in manifest.experts:
        with defects.guard():
            folder = locator.expert(entry.name, entry.path, manifest.source)
            experts.append(_read_expert(locator.root, folder, entry, known_base, files, defects))
    return experts


def _read_expert(
    root: BundleRoot,
    folder: Path,
    entry: ExpertEntry,
    base: BaseModel | None,
    files: WeightFiles,
    defects: Defects,
) -> Expert:
    source = folder / lora.CONFIG_FILE
    config = root.json(source, f"the expert {entry.name!r} must be a PEFT LoRA adapter")
    errors_before = len(defects.errors)
    lora.check_adapter_config(config, source, defects)
    file = read_header(root.weights(folder, lora.WEIGHTS_FILE))
    weights: dict[str, LoraWeights] = {}
    if len(defects.errors) == errors_before:
        weights = lora.read_lora_weights(file, config, source, base, defects, expert=entry.name)
    if len(defects.errors) > errors_before:
        weights = {}  # what the sites should be is then unknown
    files.add(f"experts/{entry.name}/{file.path.name}", file)
    return Expert(entry.name, entry.description, weights, config, folder)


def _read_drafts(
    root: BundleRoot, manifest: Manifest, base: BaseModel | None, files: WeightFiles, defects: Defects
) -> tuple[DraftHeadWeights | None, DraftLayerWeights | None]:
    """The draft head and the draft layer: the folder has either file or both."""
    head: DraftHeadWeights | None = None
    layer: DraftLayerWeights | None = None
    if manifest.draft_head is None:
        return head, layer
    hidden_size = None if base is None else base.hidden_size
    # What is wrong with the base is reported once, not again as a layer that does not go with it.
    attention = AttentionShape.of({} if base is None or defects.errors else base.config)
    with defects.guard():
        folder = root.folder(manifest.draft_head, manifest.source, "draft_head")
        has_layer = (folder / DRAFT_LAYER_FILE).exists()
        if (folder / DRAFT_HEAD_FILE).exists() or not has_layer:
            file = read_header(root.weights(folder, DRAFT_HEAD_FILE))
            files.add(f"draft_head/{file.path.name}", file)
            head = read_draft_head(file, hidden_size, defects)
        if has_layer:
            file = read_header(root.weights(folder, DRAFT_LAYER_FILE))
            files.add(f"draft_head/{file.path.name}", file)
            layer = read_draft_layer(file, hidden_size, attention, defects)
    return head, layer


def _check_base_names(manifest: Manifest, experts: list[Expert], defects: Defects) -> None:
    """Experts that name another base than the checkpoint or each other; only hub ids can be told apart by name."""
    stated = {expert.name: str(expert.config.get("base_model_name_or_path") or "") for expert in experts}
    ids = {name: base for name, base in stated.items() if is_hub_id(base) and not base.startswith("..")}
    reference = manifest.base if manifest.base and is_hub_id(manifest.base) else next(iter(ids.values()), "")
    for expert in experts:
        if expert.name in ids and not same_repository(ids[expert.name], reference):
            problem = f"base_model_name_or_path: expected {reference!r}, as the others have it"
            hint = "an expert works on its own base only; if both are the same weights, say so with --base"
            source = expert.folder / lora.CONFIG_FILE
            defects.add(defect(source, f"{problem}, found {ids[expert.name]!r}", hint))


def _check_sites(manifest: Manifest, experts: list[Expert], defects: Defects) -> int | None:
    """Every site has an expert and every expert's target is a site; returns S, or None when it is not certain."""
    if len(experts) < manifest.expert_count or not all(expert.weights for expert in experts):
        return None
    targeted = {site: expert.name for expert in experts for site in expert.weights}
    if manifest.sites is None:
        return len(targeted)
    errors_before, listed = len(defects.errors), set(manifest.sites)
    for site in manifest.sites:
        if site not in targeted:
            hint = did_you_mean(site, targeted)
            defects.add(defect(manifest.source, f"sites: no expert targets {site!r}", hint))
    for site, name in targeted.items():
        if site not in listed:
            hint = did_you_mean(site, manifest.sites)
            defects.add(defect(manifest.source, f"sites: expected {site!r}, which expert {name!r} targets", hint))
    return len(manifest.sites) if len(defects.errors) == errors_before else None
