"""The base model's folder, as far as the checkpoint must know it: config.json, tensor shapes, what ends a text.

Knows files and shapes. Does not know transformers or any architecture, and loads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from service.checkpoint.base_config import check_base_config, read_token_ids
from service.checkpoint.defects import Defects, defect, shorten
from service.checkpoint.tokenizer import check_tokenizer
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import TensorFile, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")
MAX_SHARDS = 10_000
# transformers would load these instead of the files that are checked here.
SUBSTITUTES = ("adapter_config.json", "shard-*-model-*.safetensors")


@dataclass(frozen=True)
class BaseModel:
    """What the base's headers say; `shapes` maps tensor names to shapes."""

    path: Path
    config: dict[str, Any]
    files: tuple[TensorFile, ...]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    complete: bool = True  # False: a shard could not be read, so an unknown module may still exist
    eos_token_ids: tuple[int, ...] = ()

    @property
    def hidden_size(self) -> int | None:
        """None when config.json has it under no known name."""
        return _integer(self.config, HIDDEN_SIZE_KEYS)

    @property
    def architecture(self) -> str:
        """The class that config.json names."""
        names = self.config.get("architectures") or self.config.get("model_type", "unknown")
        return ", ".join(map(str, names)) if isinstance(names, list) else str(names)

    @cached_property
    def modules(self) -> list[str]:
        """Modules with a matrix, in file order: what an adapter can name."""
        suffix = ".weight"
        return [name.removesuffix(suffix) for name, s in self.shapes.items() if name.endswith(suffix) and len(s) == 2]

    def weight_name(self, module: str) -> str | None:
        """The tensor that is `module`'s weight, or None. Some saves leave out the first component ("model.")."""
        names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
        return next((name for name in names if name in self.shapes), None)

    def weight_shape(self, module: str) -> tuple[int, ...] | None:
        """Shape of `module`'s weight, or None: [out, in], and [in, out] for Conv1D and Embedding."""
        if name := self.weight_name(module):
            return self.shapes[name]
        if module == "lm_head":  # tied to the embedding, then not saved
            return next((s for name, s in self.shapes.items() if name.endswith("embed_tokens.weight")), None)
        return None

    @property
    def parameters(self) -> int:
        """Numbers in all files."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_base(root: BundleRoot, path: Path, defects: Defects) -> BaseModel:
    """Read the folder's configuration and every safetensors header, and open its tokenizer."""
    with defects.guard():
        root.require_links_inside(path)
        _refuse_substitutes(path)
    check_tokenizer(root, path, defects)
    config = root.json(path / "config.json", "the base must be a Hugging Face model folder")
    if (path / INDEX_FILE).exists() and not (path / SINGLE_FILE).exists():
        files, complete = _read_shards(root, path, defects)
    else:
        files, complete = (read_header(root.weights(path, SINGLE_FILE)),), True
    shapes = {name: info.shape for file in files for name, info in file.tensors.items()}
    if complete:
        check_base_config(config, path / "config.json", shapes, defects)
    ends: tuple[int, ...] = ()
    with defects.guard():
        ends = _read_eos_token_ids(root, path, config)
    return BaseModel(path, config, files, shapes, complete, ends)


def _refuse_substitutes(path: Path) -> None:
    for pattern in SUBSTITUTES:
        if found := next(path.glob(pattern), None):
            problem = f"expected none beside {SINGLE_FILE}: transformers would load it in its place"
            raise defect(found, problem, "delete it from the base's folder")


def _read_eos_token_ids(root: BundleRoot, path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json overrides config.json, as in transformers' generate."""
    vocabulary, generation = _integer(config, ("vocab_size",)), path / GENERATION_FILE
    own = read_token_ids(config.get("eos_token_id"), path / "config.json", vocabulary)
    stated = root.json(generation).get("eos_token_id") if generation.exists() else None
    return own if stated is None else read_token_ids(stated, generation, vocabulary)


def _integer(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first integer under one of `keys`, in config.json itself or in its part on text."""
    text_config = config.get("text_config")
    sections = [config, text_config if isinstance(text_config, dict) else {}]
    values = (section.get(key) for section in sections for key in keys)
    return next((value for value in values if type(value) is int), None)


def _read_shards(root: BundleRoot, path: Path, defects: Defects) -> tuple[tuple[TensorFile, ...], bool]:
    """The shards that the index names, each checked against it, and whether all could be read."""
    index = path / INDEX_FILE
    weight_map = root.json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise defect(index, f"weight_map: expected tensor names and their files, found {weight_map!r:.80}")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    if len(shards) > MAX_SHARDS:
        raise defect(index, f"weight_map: expected at most {MAX_SHARDS:,} files, found {len(shards):,}")
    files = []
    for shard in sorted(shards):
        with defects.guard():
            file = read_header(root.weights(path, shard))
            files.append(file)
            missing = [name for name in shards[shard] if name not in file.tensors]
            if missing:
                raise defect(file.path, f"missing tensor {shorten(missing)}, which {INDEX_FILE} expects here")
    return tuple(files), len(files) == len(shards)
