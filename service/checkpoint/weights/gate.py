"""The gate's two files -> its configuration and the order of its layers, before the experts are known.

Knows how the configuration depends on the base and on the number of experts. The classifier's shapes depend on the
sites as well: read_classifier checks them later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from service.checkpoint.base import BaseModel
from service.checkpoint.config import XLoraConfig
from service.checkpoint.defects import Defects, defect
from service.checkpoint.formats.manifest import Manifest
from service.checkpoint.weights.classifier import has_relu, layer_prefixes
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.hashes import WeightHasher
from service.checkpoint.weights.tensors import TensorFile, read_header


@dataclass(frozen=True, slots=True)
class OpenGate:
    """What is known of the gate before the experts are."""

    config: XLoraConfig
    file: TensorFile
    prefixes: list[str]  # of the classifier's tensors, in the order of its layers


def open_gate(
    root: BundleRoot,
    manifest: Manifest,
    base: BaseModel | None,
    hasher: WeightHasher,
    relu: bool | None,
    defects: Defects,
) -> OpenGate:
    """The gate of a checkpoint. `relu` is what the operator says of its layers; None: what the files say."""
    gate = manifest.gate
    folder = root.folder(gate.folder, manifest.source, "classifier")
    source = folder / gate.config
    data = root.json(source)
    config = _check_xlora_config(data, source, manifest, base, defects)
    file = read_header(root.weights(folder, gate.weights))
    hasher.add(f"classifier/{file.path.name}", file)
    prefixes = layer_prefixes(file, config, gate)
    relu = has_relu(file, gate, data.get("enable_relu_and_dropout") if relu is None else relu)
    return OpenGate(replace(config, enable_relu_and_dropout=relu), file, prefixes)


def _check_xlora_config(
    data: Mapping[str, Any], source: Path, manifest: Manifest, base: BaseModel | None, defects: Defects
) -> XLoraConfig:
    config = XLoraConfig.from_dict(data, source)
    if base is not None and base.hidden_size not in (None, config.hidden_size):
        problem = f"hidden_size: expected {base.hidden_size} as in {base.path / 'config.json'}"
        defects.add(defect(source, f"{problem}, found {config.hidden_size}"))
        config = replace(config, hidden_size=base.hidden_size or config.hidden_size)  # for the classifier's shapes
    experts = manifest.expert_count
    if config.top_k_lora is not None and config.top_k_lora > experts:
        problem = f"top_k_lora: expected at most {experts}, the number of experts, found {config.top_k_lora}"
        defects.add(defect(source, problem))
    return config
