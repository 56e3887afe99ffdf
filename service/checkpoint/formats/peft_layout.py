"""PEFT's save of an X-LoRA model -> Manifest: adapter_config.json with peft_type XLORA, and a folder per expert.

Knows what PEFT writes, and what it damages: since 0.20 its save of one adapter drops every tensor with `.j.` in its
name where j is another adapter's name. X-LoRA's adapters are called "0", "1", ..., as are the classifier's layers and
the base's, so both the classifier's file and the experts' folders lose tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.checkpoint.defects import defect
from service.checkpoint.formats.manifest import ExpertEntry, Manifest
from service.checkpoint.formats.ordering import Ordering
from service.checkpoint.weights import lora
from service.checkpoint.weights.classifier import PEFT_PREFIX, GateFiles
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import TensorFile, read_header

PEFT_TYPE = "XLORA"
FIRST_DAMAGING_VERSION = (0, 20)


def read_peft_manifest(root: BundleRoot, ordering: Ordering | None, *, rescue: bool) -> Manifest:
    """The manifest in class order: class j is the expert with integer key j, whatever order the JSON file has.

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
    found = Manifest(
        layout="PEFT",
        source=source,
        name=root.name,
        base=base if isinstance(base, str) and base else None,
        experts=tuple(ExpertEntry(name, _place(root, name, place, data), "") for name, place in adapters.items()),
        expert_count=len(adapters),
        gate=gate,
    )
    return ordering.apply(found) if ordering else found


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
    """The expert's folder: the one saved with the classifier, or the one it was made from.

    The saved one where it is sound, or where training went on (use_trainable_adapters); else the stated one. Where only
    one of them is there, that one.
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
    """Classifier layer k, where an expert is called k: PEFT writes it to that expert's folder, without its number."""
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
