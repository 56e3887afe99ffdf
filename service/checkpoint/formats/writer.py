"""Writes bundles: bundle.json, classifier and drafts around a base and adapters that are in place already; or a whole
checkpoint of any layout into a new folder.

Knows the format of DESIGN section 5, and which files are copied, renamed and cast. Builds no modules: the caller passes
the order of the sites.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from service.chat_template import TEMPLATE_FOLDER
from service.checkpoint.base import INDEX_FILE, read_base
from service.checkpoint.config import XLoraConfig
from service.checkpoint.defects import Defects, defect
from service.checkpoint.formats.bundle import Checkpoint, Expert
from service.checkpoint.formats.manifest import FILE_NAME, FORMAT_VERSION, GATE_CONFIG, GATE_FOLDER, GATE_WEIGHTS
from service.checkpoint.weights.draft_head import FOLDER as DRAFT_HEAD_FOLDER
from service.checkpoint.weights.draft_head import WEIGHTS_FILE as DRAFT_HEAD_FILE
from service.checkpoint.weights.draft_head import DraftHeadWeights, draft_head_bytes
from service.checkpoint.weights.draft_layer import WEIGHTS_FILE as DRAFT_LAYER_FILE
from service.checkpoint.weights.draft_layer import DraftLayerWeights, draft_layer_bytes
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.lora import CONFIG_FILE, WEIGHTS_FILE
from service.checkpoint.weights.tensors import TensorFile, file_sha256, read_tensors

BASE_FILES = (
    "*.json",
    "*.jinja",
    f"{TEMPLATE_FOLDER}/*.jinja",
)  # weights are copied one by one
SAFE_NAME = re.compile(r"\w[\w.-]*")


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
    draft_layer: DraftLayerWeights | None = None,
    base: str = "base",
) -> Path:
    """Complete the bundle at `path`, whose base and adapter folders exist; returns the path of bundle.json.

    `experts` is (name, description, adapter folder relative to `path`) in class order, `sites` the adapted modules in
    traversal order, `classifier` the (weight [out, in], bias [out]) pairs from the first layer to the last.
    Nothing is validated here: load the result with `load_checkpoint`.
    """
    path = Path(path)
    folder = path / GATE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    config = xlora if isinstance(xlora, XLoraConfig) else XLoraConfig.from_dict(xlora, folder / GATE_CONFIG)
    _write_json(folder / GATE_CONFIG, config.to_dict())
    # not save_file: its files are readable by their owner only, and a container runs as another user
    (folder / GATE_WEIGHTS).write_bytes(save(classifier_tensors(list(classifier), config)))
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "base": base,
        "experts": [{"name": title, "path": where, "description": text} for title, text, where in experts],
        "classifier": GATE_FOLDER,
        "sites": list(sites),
        "sha256": {file: file_sha256(path / file) for file in _weight_files(path, [base, *(e[2] for e in experts)])},
    }
    if gate_profile is not None:
        manifest["gate_profile"] = dict(gate_profile)
    _write_json(path / FILE_NAME, manifest)
    add_drafts(path, draft_head, draft_layer)
    return path / FILE_NAME


def add_drafts(path: Path, head: DraftHeadWeights | None, layer: DraftLayerWeights | None) -> None:
    """Writes a draft head, a draft layer or both to the bundle at `path`, replacing those that it has; None keeps them.
    Nothing else changes, and every file is replaced atomically. Wherever that ends, the bundle can be loaded: it has no
    hashes of the files that are being replaced. Raises OSError.
    """
    contents: dict[str, bytes] = {}
    if head is not None:
        contents[f"{DRAFT_HEAD_FOLDER}/{DRAFT_HEAD_FILE}"] = draft_head_bytes(head)
    if layer is not None:
        contents[f"{DRAFT_HEAD_FOLDER}/{DRAFT_LAYER_FILE}"] = draft_layer_bytes(layer)
    if not contents:
        return
    manifest = json.loads((path / FILE_NAME).read_text(encoding="utf-8"))
    (path / DRAFT_HEAD_FOLDER).mkdir(exist_ok=True)
    known = manifest.get("sha256") or {}
    others = {file: value for file, value in known.items() if file not in contents}
    if len(others) < len(known):
        _replace(path / FILE_NAME, _json_bytes({**manifest, "sha256": others}))
    for file, content in contents.items():
        _replace(path / file, content)
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    _replace(
        path / FILE_NAME, _json_bytes({**manifest, "draft_head": DRAFT_HEAD_FOLDER, "sha256": {**known, **hashes}})
    )


def classifier_tensors(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], config: XLoraConfig
) -> dict[str, torch.Tensor]:
    """Tensors by the original library's names: `inner` counts ReLU and Dropout, too, so Linears are 3 numbers apart."""
    stride = 3 if config.enable_relu_and_dropout else 1
    tensors: dict[str, torch.Tensor] = {}
    for index, (weight, bias) in enumerate(layers):
        prefix = "last" if index == len(layers) - 1 else f"inner.{stride * index}"
        tensors[f"{prefix}.weight"] = weight.detach().float().cpu().contiguous()
        if bias is not None:
            tensors[f"{prefix}.bias"] = bias.detach().float().cpu().contiguous()
    return tensors


def _weight_files(path: Path, folders: Sequence[str]) -> list[str]:
    """Paths of the bundle's weight files, relative to it; a base outside of it is not hashed."""
    inside = [folder for folder in (*folders, GATE_FOLDER) if (path / folder).resolve().is_relative_to(path.resolve())]
    return sorted({file.relative_to(path).as_posix() for d in inside for file in (path / d).glob("*.safetensors")})


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file atomically by one that everybody may read."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content)
        new.chmod(0o644)
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_bytes(_json_bytes(data))


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def convert(
    checkpoint: Checkpoint,
    target: Path,
    sites: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
    reference_base: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write `checkpoint` as a bundle at `target`, which must not exist or be empty; returns `target`.

    `dtype` is that of the experts and of a copied base, None for their own; the classifier stays fp32. With
    `reference_base` the bundle names the base instead of copying it. Nothing appears at `target` before it is complete.
    """
    with staged(target) as folder:
        base, base_from_expert = "base", "../../base"
        if reference_base:
            base = base_from_expert = checkpoint.base_reference
        if not reference_base:
            on_progress(f"copying the base from {checkpoint.base_path}")
            copy_base(checkpoint.base_path, folder / "base", dtype)
        entries = []
        for number, expert in enumerate(checkpoint.experts):
            on_progress(f"writing expert {expert.name}")
            where = f"experts/{expert_folder(expert.name, number)}"
            write_expert(folder / where, expert, base_from_expert, dtype)
            entries.append((expert.name, expert.description, where))
        on_progress("writing the classifier and hashes")
        write_bundle(
            folder,
            name=checkpoint.name,
            experts=entries,
            sites=sites,
            xlora=checkpoint.xlora,
            classifier=checkpoint.classifier.layers,
            gate_profile=checkpoint.gate_profile,
            draft_head=checkpoint.draft_head,
            draft_layer=checkpoint.draft_layer,
            base=base,
        )
    return target


class staged:
    """`with staged(target) as folder:` fills a hidden folder beside `target`, which becomes `target` on success."""

    def __init__(self, target: Path) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise defect(target, "expected a new or an empty folder", "name another folder, or delete this one first")
        self.target = target

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=self.target.parent, prefix=f".{self.target.name}-"))
        self.folder.chmod(0o755)  # mkdtemp's are for their owner only, and a container runs as another user
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self.folder)
            return
        if self.target.exists():
            self.target.rmdir()
        self.folder.rename(self.target)


def expert_folder(name: str, number: int) -> str:
    """The folder name of an expert: its own name if that is a plain word."""
    return name if SAFE_NAME.fullmatch(name) else f"expert-{number}"


def write_expert(folder: Path, expert: Expert, base: str, dtype: torch.dtype | None) -> None:
    """Writes an expert as a PEFT adapter, with PEFT's usual tensor names."""
    config = {**expert.config, "base_model_name_or_path": base}
    tensors: dict[str, torch.Tensor] = {}
    for site, weights in expert.weights.items():
        pattern = "lora_embedding_{}" if weights.embedding else "lora_{}.weight"
        for side, tensor in (("A", weights.a), ("B", weights.b)):
            tensors[f"base_model.model.{site}.{pattern.format(side)}"] = tensor[...]
    write_adapter(folder, config, tensors, dtype)


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which everybody may read (save_file's are not)."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    stored = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    (folder / WEIGHTS_FILE).write_bytes(save(stored, metadata={"format": "pt"}))


def copy_base(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copies the base's configuration, tokenizer and weights, one weight file at a time."""
    target.mkdir()
    base = read_base(BundleRoot(source, allow_outside=True), source, Defects())
    for pattern in BASE_FILES:
        for file in source.glob(pattern):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    for weights in base.files:
        copy_weights(weights, target / weights.path.name, dtype)
    if dtype is not None:
        config = dict(base.config)
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (target / INDEX_FILE).exists():
            index = json.loads((target / INDEX_FILE).read_text(encoding="utf-8"))
            index["metadata"] = {"total_size": base.parameters * dtype.itemsize}
            (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_weights(file: TensorFile, target: Path, dtype: torch.dtype | None) -> None:
    """Copies one safetensors file, byte by byte or with every tensor cast."""
    if dtype is None:
        shutil.copyfile(file.path, target)
        return
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(file).items()}
    target.write_bytes(save(tensors, metadata={"format": "pt"}))
