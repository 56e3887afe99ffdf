"""Reads and writes the draft layer's file; checks its tensors against the base's shapes.

Knows names and shapes only; builds no module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from service.checkpoint.defects import Defects, defect
from service.checkpoint.weights.tensors import TensorFile, read_tensors

WEIGHTS_FILE = "draft_layer.safetensors"  # beside the draft head's
MAX_DEPTH = 16
_NAMES = {
    "mix": "mix.weight",
    "depths": "depths",
    "query": "query.weight",
    "output": "output.weight",
    "up": "up.weight",
    "bias": "up.bias",
    "down": "down.weight",
    "agreement": "agreement",
}


@dataclass(frozen=True, slots=True)
class DraftLayerWeights:
    """The draft layer's tensors, of any floating dtype. m is the depth: the number of drafted tokens, of which the
    base's head drafts the first; Q = heads * head_dim.
    """

    mix: torch.Tensor  # [H, 2 H]
    depths: torch.Tensor  # [m - 1, H]
    query: torch.Tensor  # [Q, H]
    output: torch.Tensor  # [H, Q]
    up: torch.Tensor  # [R, H]
    bias: torch.Tensor  # [R]
    down: torch.Tensor  # [H, R]
    agreement: torch.Tensor  # fp32 [m]: acceptance rate at each depth, if earlier drafts were right, on held-out texts

    @property
    def depth(self) -> int:
        """m"""
        return len(self.agreement)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the computation, by name."""
        return {name: getattr(self, name) for name in _NAMES if name != "agreement"}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The shape of the base's attention by its configuration; None: not stated."""

    head_dim: int | None
    kv_heads: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AttentionShape:
        """The shape that config.json states; nothing if some layers have another shape."""
        text = config.get("text_config")
        fields = {**config, **(text if isinstance(text, dict) else {})}
        if any("global" in name for name in fields):
            return cls(None, None)
        sizes = (fields.get(name) for name in ("head_dim", "num_key_value_heads"))
        return cls(*(size if type(size) is int and size > 0 else None for size in sizes))

    @property
    def query_unit(self) -> int:
        """The unit of Q: a multiple of it gives every KV head equally many query heads."""
        return (self.head_dim or 1) * (self.kv_heads or 1)


def read_draft_layer(
    file: TensorFile, hidden_size: int | None, attention: AttentionShape, defects: Defects
) -> DraftLayerWeights | None:
    """The tensors; None when one is missing or wrong. `hidden_size` is H, None if unknown."""
    before = len(defects.errors)
    for name in file.tensors:
        if name not in _NAMES.values():
            expected = ", ".join(_NAMES.values())
            defects.add(defect(file.path, f"unexpected tensor {name!r}", f"a draft layer has {expected}"))
    for name in _NAMES.values():
        if name not in file.tensors:
            defects.add(defect(file.path, f"missing tensor {name!r}"))
    if len(defects.errors) > before or not _check_shapes(file, hidden_size, attention, defects):
        return None
    tensors = read_tensors(file)
    agreement = tensors["agreement"].float()
    if agreement.min() < 0 or agreement.max() > 1:
        found = [round(rate, 3) for rate in agreement.tolist()]
        defects.add(defect(file.path, f"tensor 'agreement': expected shares from 0 to 1, found {found}"))
        return None
    kept = {field: tensors[name] for field, name in _NAMES.items()}
    return DraftLayerWeights(**{**kept, "agreement": agreement})


def _check_shapes(file: TensorFile, hidden_size: int | None, attention: AttentionShape, defects: Defects) -> bool:
    """Reports tensors whose shapes do not fit the base or each other. Returns whether there are none."""
    before = len(defects.errors)
    shapes = {field: file.tensors[name].shape for field, name in _NAMES.items()}

    def add(field: str, expected: str) -> None:
        problem = f"tensor {_NAMES[field]!r}: expected {expected}, found {list(shapes[field])}"
        defects.add(defect(file.path, problem))

    mix, up, query, agreement = shapes["mix"], shapes["up"], shapes["query"], shapes["agreement"]
    hidden = hidden_size or (mix[0] if mix else 0)
    if mix != (hidden, 2 * hidden) or not hidden:
        size = "[hidden size, 2 hidden size]" if hidden_size is None else f"[{hidden}, {2 * hidden}]"
        add("mix", f"shape {size}")
        return False
    if len(agreement) != 1 or not 2 <= agreement[0] <= MAX_DEPTH + 1:
        add("agreement", f"a number for each of 2 to {MAX_DEPTH + 1} depths")
        return False
    if len(up) != 2 or up[1] != hidden or not up[0]:
        add("up", f"shape [any, {hidden}]")
        return False
    if len(query) != 2 or query[1] != hidden or not query[0] or query[0] % attention.query_unit:
        add("query", f"shape [a multiple of {attention.query_unit}, {hidden}]")
        return False
    expected = {
        "depths": (agreement[0] - 1, hidden),
        "output": (hidden, query[0]),
        "bias": (up[0],),
        "down": (hidden, up[0]),
    }
    for field, shape in expected.items():
        if shapes[field] != shape:
            add(field, f"shape {list(shape)}")
    return len(defects.errors) == before


def draft_layer_bytes(weights: DraftLayerWeights) -> bytes:
    """The content of the draft layer's file."""
    tensors = {name: getattr(weights, field).detach().cpu().contiguous() for field, name in _NAMES.items()}
    return save({**tensors, "agreement": tensors["agreement"].float()})
