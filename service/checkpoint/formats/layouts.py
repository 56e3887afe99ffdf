"""Recognises a folder's layout (our bundle, PEFT's save, or the original library's) and reads its Manifest.

Knows which file marks which layout, and what PEFT damages: since 0.20 its save of one adapter drops every tensor with
`.j.` in its name where j is another adapter's name. X-LoRA's adapters are called "0", "1", ..., as are the classifier's
layers and the base's, so both the classifier's file and the experts' folders lose tensors. Before 2024-02-23 the
original library saved the experts in a folder `adapters` of their own. The rest of the program does not know which
layout it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.checkpoint.defects import Defects, defect
from service.checkpoint.formats.manifest import (
    FILE_NAME,
    GATE_CONFIG,
    GATE_WEIGHTS,
    ExpertEntry,
    GateFiles,
    Manifest,
    Ordering,
    read_bundle_manifest,
)
from service.checkpoint.weights import lora
from service.checkpoint.weights.classifier import PEFT_PREFIX
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import TensorFile, read_header

PEFT_TYPE = "XLORA"
FIRST_DAMAGING_VERSION = (0, 20)
EARLY_FOLDER = "adapters"


def read_manifest(root: BundleRoot, ordering: Ordering | None, defects: Defects, *, rescue: bool) -> Manifest:
    """Reads the folder's manifest. `ordering` replaces its order of experts and sites.

    `rescue` repairs damage where the files allow it (PEFT's lost classifier tensors).
    """
    if not root.path.is_dir():
        raise defect(root.path, "expected a bundle folder, found " + ("a file" if root.path.exists() else "nothing"))
    if (root.path / FILE_NAME).exists():
        found = read_bundle_manifest(root, defects)
    elif (root.path / GATE_CONFIG).exists():
        found = _read_original_manifest(root, ordering)
    elif (root.path / lora.CONFIG_FILE).exists():
        found = _read_peft_manifest(root, ordering, rescue=rescue)
    else:
        raise _unknown(root)
    return ordering.apply(found) if ordering else found


def _unknown(root: BundleRoot) -> Exception:
    hint = "a bundle has bundle.json, a PEFT save adapter_config.json, one of the original library xlora_config.json"
    if (root.path / "config.json").exists():
        return defect(root.path, "expected an X-LoRA checkpoint, found a plain model", hint)
    return defect(root.path / FILE_NAME, "expected a file, found nothing", hint)


def _read_peft_manifest(root: BundleRoot, ordering: Ordering | None, *, rescue: bool) -> Manifest:
    """The manifest in class order: class j is the expert with integer key j, in any order of the JSON file.

    With `rescue`, classifier tensors that PEFT dropped are taken from the experts' folders, where it wrote them.
    """
    source = root.path / lora.CONFIG_FILE
    data = root.json(source)
    if data.get("peft_type") != PEFT_TYPE:
        problem = f"peft_type: expected {PEFT_TYPE!r}, found {data.get('peft_type')!r:.80}"
        raise defect(source, problem, "one adapter has no gate; an X-LoRA checkpoint has several and a classifier")
    adapters = _adapters(data.get("adapters"), source, ordering)
    stray = _stray_layers(root, adapters)
    gate = GateFiles(
        folder=".",
        experts=len(adapters),
        config=lora.CONFIG_FILE,
        weights=lora.WEIGHTS_FILE,
        peft_names=True,
        loss_hint=_loss_hint(data, stray),
        moved=stray if rescue else {},
    )
    base = data.get("base_model_name_or_path")
    return Manifest(
        layout="PEFT",
        source=source,
        name=root.name,
        base=base if isinstance(base, str) and base else None,
        experts=tuple(ExpertEntry(name, _place(root, name, place, data), "") for name, place in adapters.items()),
        expert_count=len(adapters),
        gate=gate,
    )


def _adapters(adapters: Any, source: Path, ordering: Ordering | None) -> dict[str, str]:
    """{key: place} by integer key. The file is sorted as text, so other keys have lost their order."""
    if not isinstance(adapters, dict) or not adapters or not all(isinstance(p, str) for p in adapters.values()):
        raise defect(source, f"adapters: expected a map from keys to folders, found {adapters!r:.80}")
    if set(adapters) == {str(number) for number in range(len(adapters))}:
        return {str(number): adapters[str(number)] for number in range(len(adapters))}
    if ordering is None or ordering.experts is None:
        problem = f"adapters: expected the keys '0' to '{len(adapters) - 1}', found {', '.join(sorted(adapters))}"
        raise defect(source, problem, "the class order is lost; give it with --ordering and its key 'order'")
    return adapters


def _place(root: BundleRoot, name: str, stated: str, data: Mapping[str, Any]) -> str:
    """The expert's folder: the one that was saved with the classifier, or the stated one, which it was made from.

    The saved one if it is undamaged, or if it was trained further (use_trainable_adapters); else the stated one. If
    only one of them exists, that one.
    """
    has_saved = (root.path / name / lora.CONFIG_FILE).exists()
    has_stated = (root.path / stated).is_dir() and root.holds(root.path / stated)
    prefer_saved = data.get("use_trainable_adapters") is True or not _is_damaging(data)
    return name if has_saved and (prefer_saved or not has_stated) else stated


def _is_damaging(data: Mapping[str, Any]) -> bool:
    """Whether the PEFT that wrote the file drops tensors; versions before 0.17 do not say which they are."""
    numbers = re.match(r"(\d+)\.(\d+)", str(data.get("peft_version") or ""))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= FIRST_DAMAGING_VERSION


def _stray_layers(root: BundleRoot, names: Mapping[str, str]) -> dict[str, tuple[TensorFile, str]]:
    """Classifier tensors in experts' folders: PEFT writes layer k to the folder of an expert named k, without its
    number.
    """
    found: dict[str, tuple[TensorFile, str]] = {}
    for name in names:
        path = root.path / name / lora.WEIGHTS_FILE
        if path.is_file() and root.holds(path):
            file = read_header(path)
            for kind in ("weight", "bias"):
                if f"{PEFT_PREFIX}.{kind}" in file.tensors:
                    found[f"{PEFT_PREFIX}.{name}.{kind}"] = (file, f"{PEFT_PREFIX}.{kind}")
    return found


def _loss_hint(data: Mapping[str, Any], stray: Mapping[str, Any]) -> str:
    version = data.get("peft_version") or "an unknown version"
    happened = f"PEFT 0.20 and later drop classifier tensors when they save X-LoRA, and this is from {version}"
    if stray:
        return f"{happened}; the experts' folders have them: xlora-serve convert --rescue SRC DST"
    from_memory = "from the live model with service.checkpoint.export, or save it with PEFT 0.19.1"
    return f"{happened}; they are in no file: write a bundle {from_memory}"


def _read_original_manifest(root: BundleRoot, ordering: Ordering | None) -> Manifest:
    """The manifest in class order: that of `adapters`, or of `ordering`, which can also stand in for a missing list."""
    source = root.path / GATE_CONFIG
    data = root.json(source)
    adapters = data.get("adapters")
    if adapters is None and ordering is not None and ordering.experts is not None:
        adapters = list(ordering.experts)
    entries = _experts(root, adapters, source)
    base = data.get("base_model_id")
    return Manifest(
        layout="original",
        source=source,
        name=root.name,
        base=base if isinstance(base, str) and base else None,
        experts=entries,
        expert_count=len(entries),
        gate=GateFiles(".", len(entries), GATE_CONFIG, GATE_WEIGHTS, relu=None),  # its default was false, then true
    )


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
    """The folder of the expert that was saved with the classifier. If a later save went into the folder of an early
    one, and both places exist, the classifier is the later one's, and so is the expert. PEFT saves "default" without a
    folder of its own.
    """
    own = [name, "."] if name == "default" else [name]
    early = [EARLY_FOLDER if place == "." else f"{EARLY_FOLDER}/{place}" for place in own]
    return next((place for place in (*own, *early) if (root.path / place / lora.CONFIG_FILE).exists()), None)
