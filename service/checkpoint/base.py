"""The base model's folder, as far as the checkpoint must know it: config.json, tensor shapes, the tokenizer's presence.

Knows files and shapes. Does not know transformers or any architecture, and loads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from service.checkpoint.defects import Defects, defect, shorten
from service.checkpoint.files import BundleRoot
from service.checkpoint.tensors import TensorFile, read_header, read_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class BaseModel:
    """What the base's headers say; `shapes` maps tensor names to shapes."""

    path: Path
    config: dict[str, Any]
    files: tuple[TensorFile, ...]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    complete: bool = True  # False: a shard could not be read, so an unknown module may still exist

    @property
    def hidden_size(self) -> int | None:
        """None when config.json has it under no known name."""
        text_config = self.config.get("text_config")
        sections = [self.config, text_config if isinstance(text_config, dict) else {}]
        values = (section.get(key) for section in sections for key in HIDDEN_SIZE_KEYS)
        return next((value for value in values if isinstance(value, int)), None)

    @property
    def architecture(self) -> str:
        """The class that config.json names."""
        names = self.config.get("architectures") or self.config.get("model_type", "unknown")
        return ", ".join(map(str, names)) if isinstance(names, list) else str(names)

    @property
    def modules(self) -> list[str]:
        """Modules with a matrix, in file order: what an adapter can name."""
        suffix = ".weight"
        return [name.removesuffix(suffix) for name, s in self.shapes.items() if name.endswith(suffix) and len(s) == 2]

    def weight_name(self, module: str) -> str | None:
        """The tensor that is `module`'s weight, or None. Some saves leave out the first component ("model.")."""
        names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
        return next((name for name in names if name in self.shapes), None)

    def weight(self, module: str) -> torch.Tensor | None:
        """`module`'s weight, read from its file; None when it is not there."""
        name = self.weight_name(module)
        file = next((file for file in self.files if name in file.tensors), None)
        return read_tensor(file, name) if file and name else None

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
    """Read config.json and every safetensors header of the folder at `path`."""
    with defects.guard():
        root.file(path / "tokenizer.json", "save the base with a fast tokenizer: AutoTokenizer(...).save_pretrained")
    config = root.json(path / "config.json", "the base must be a Hugging Face model folder")
    if config.get("quantization_config"):
        problem = "quantization_config: expected none, found a quantised base"
        defects.add(defect(path / "config.json", problem, "use the model's float32, float16 or bfloat16 weights"))
    if (path / INDEX_FILE).exists() and not (path / SINGLE_FILE).exists():
        files, complete = _read_shards(root, path, defects)
    else:
        files, complete = (read_header(root.weights(path, SINGLE_FILE)),), True
    shapes = {name: info.shape for file in files for name, info in file.tensors.items()}
    return BaseModel(path, config, files, shapes, complete)


def _read_shards(root: BundleRoot, path: Path, defects: Defects) -> tuple[tuple[TensorFile, ...], bool]:
    """The shards that the index names, each checked against it, and whether all could be read."""
    index = path / INDEX_FILE
    weight_map = root.json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise defect(index, f"weight_map: expected tensor names and their files, found {weight_map!r:.80}")
    files = []
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        with defects.guard():
            file = read_header(root.weights(path, shard))
            files.append(file)
            missing = [name for name, where in weight_map.items() if where == shard and name not in file.tensors]
            if missing:
                raise defect(file.path, f"missing tensor {shorten(missing)}, which {INDEX_FILE} expects here")
    return tuple(files), len(files) == len(shards)
