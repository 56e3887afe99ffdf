"""Reads and writes the draft head's file; checks its tensors against the base's hidden size.

Knows names and shapes only; builds no module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import save

from service.checkpoint.defects import Defects, defect
from service.checkpoint.weights.tensors import TensorFile, read_tensors

FOLDER = "draft_head"
WEIGHTS_FILE = "draft_head.safetensors"
_NAMES = ("up.weight", "up.bias", "down.weight")


@dataclass(frozen=True, slots=True)
class DraftHeadWeights:
    """The draft head's tensors, of any floating dtype. R is its inner width."""

    up: torch.Tensor  # [R, H]
    bias: torch.Tensor  # [R]
    down: torch.Tensor  # [H, R]

    @property
    def size(self) -> int:
        """R"""
        return self.up.shape[0]


def read_draft_head(file: TensorFile, hidden_size: int | None, defects: Defects) -> DraftHeadWeights | None:
    """The tensors; None when one is missing or has a wrong shape. `hidden_size` is H, None if unknown."""
    before = len(defects.errors)
    for name in file.tensors:
        if name not in _NAMES:
            defects.add(defect(file.path, f"unexpected tensor {name!r}", f"a draft head has {', '.join(_NAMES)}"))
    for name in _NAMES:
        if name not in file.tensors:
            defects.add(defect(file.path, f"missing tensor {name!r}"))
    if len(defects.errors) > before:
        return None
    shape = file.tensors["up.weight"].shape
    if len(shape) != 2 or 0 in shape or hidden_size not in (None, shape[1]):
        size = "hidden size" if hidden_size is None else hidden_size
        defects.add(defect(file.path, f"tensor 'up.weight': expected shape [any, {size}], found {list(shape)}"))
        return None
    for name, expected in (("up.bias", (shape[0],)), ("down.weight", (shape[1], shape[0]))):
        if (found := file.tensors[name].shape) != expected:
            problem = f"tensor {name!r}: expected shape {list(expected)}, found {list(found)}"
            defects.add(defect(file.path, problem))
    if len(defects.errors) > before:
        return None
    return DraftHeadWeights(*map(read_tensors(file).__getitem__, _NAMES))


def draft_head_bytes(weights: DraftHeadWeights) -> bytes:
    """The content of the draft head's file."""
    tensors = (weights.up, weights.bias, weights.down)
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in zip(_NAMES, tensors, strict=True)})
