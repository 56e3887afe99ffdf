"""Writing a bundle: bundle.json, classifier and draft head, around a base and adapters that already lie in place.

Knows the format of DESIGN section 5. Copies and changes no base or adapter file; hashes all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from service.checkpoint.config import XLoraConfig
from service.checkpoint.weights.draft_head import FOLDER as DRAFT_HEAD_FOLDER
from service.checkpoint.weights.draft_head import WEIGHTS_FILE as DRAFT_HEAD_FILE
from service.checkpoint.weights.draft_head import DraftHeadWeights, draft_head_bytes

FORMAT_VERSION = 1


def write_bundle(
    path: Path,
    *,
    name: str,
    experts: Sequence[tuple[str, str, str]],
    sites: Sequence[str],
    xlora: XLoraConfig | Mapping[str, Any],
    classifier: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    gate_profile: Mapping[str, Any] | None = None,
    draft_head: DraftHeadWeights | None = None,
    base: str = "base",
) -> Path:
    """Complete the bundle at `path`, whose base and adapter folders exist; returns the path of bundle.json.

    `experts` is (name, description, adapter folder relative to `path`) in class order, `sites` the adapted modules in
    traversal order, `classifier` the (weight [out, in], bias [out]) pairs from the first layer to the last.
    Nothing is validated here: load the result with `load_checkpoint`.
    """
    path = Path(path)
    folder = path / "classifier"
    folder.mkdir(parents=True, exist_ok=True)
    config = xlora if isinstance(xlora, XLoraConfig) else XLoraConfig.from_dict(xlora, folder / "xlora_config.json")
    _write_json(folder / "xlora_config.json", config.to_dict())
    # not save_file: it makes files that only their owner may read, which a container's user is not
    (folder / "xlora_classifier.safetensors").write_bytes(save(classifier_tensors(list(classifier), config)))
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "base": base,
        "experts": [{"name": title, "path": where, "description": text} for title, text, where in experts],
        "classifier": "classifier",
        "sites": list(sites),
        "sha256": {file: file_sha256(path / file) for file in _weight_files(path, [base, *(e[2] for e in experts)])},
    }
    if gate_profile is not None:
        manifest["gate_profile"] = dict(gate_profile)
    _write_json(path / "bundle.json", manifest)
    if draft_head is not None:
        add_draft_head(path, draft_head)
    return path / "bundle.json"


def add_draft_head(path: Path, weights: DraftHeadWeights) -> None:
    """Gives the bundle at `path` a draft head, in the place of one that it has. Nothing else of it changes, and each
    file is there as a whole or as it was. Raises OSError.
    """
    manifest = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    content, file = draft_head_bytes(weights), f"{DRAFT_HEAD_FOLDER}/{DRAFT_HEAD_FILE}"
    (path / file).parent.mkdir(exist_ok=True)
    _replace(path / file, content)
    manifest["draft_head"] = DRAFT_HEAD_FOLDER
    manifest["sha256"] = {**(manifest.get("sha256") or {}), file: hashlib.sha256(content).hexdigest()}
    _replace(path / "bundle.json", _json_bytes(manifest))


def classifier_tensors(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], config: XLoraConfig
) -> dict[str, torch.Tensor]:
    """The original library's names: `inner` counts ReLU and Dropout as entries too, so its Linears stand 3 apart."""
    stride = 3 if config.enable_relu_and_dropout else 1
    tensors: dict[str, torch.Tensor] = {}
    for index, (weight, bias) in enumerate(layers):
        prefix = "last" if index == len(layers) - 1 else f"inner.{stride * index}"
        tensors[f"{prefix}.weight"] = weight.detach().float().cpu().contiguous()
        if bias is not None:
            tensors[f"{prefix}.bias"] = bias.detach().float().cpu().contiguous()
    return tensors


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(path: Path, folders: Sequence[str]) -> list[str]:
    """Weight files of the bundle relative to it; a base that lies outside is not hashed."""
    inside = [folder for folder in (*folders, "classifier") if (path / folder).resolve().is_relative_to(path.resolve())]
    return sorted({file.relative_to(path).as_posix() for d in inside for file in (path / d).glob("*.safetensors")})


def _replace(path: Path, content: bytes) -> None:
    """A new file in the place of the old one, readable by everybody."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.chmod(0o644)
    os.replace(new, path)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_bytes(_json_bytes(data))


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
