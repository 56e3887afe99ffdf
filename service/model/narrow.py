"""Weights that bfloat16 holds without loss stay in bfloat16 under float32 arithmetic: half the memory, and half of what
a decode step reads, which is most of its time. Results are the same up to rounding.

The C++ kernels widen them as they read (kernels/linear.h); torch's operators get a wide copy for the length of a
call. Only linears in layers of the usual names, and the head after them: code that looks at a weight itself would find
another dtype than it knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from service.checkpoint import Checkpoint
from service.model.linear import WIDENED_AT_ONCE, PlainLinear, XLoraLinear

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
LAYER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stored_dtype(base: Path) -> str:
    """What config.json says that the base's weights are, as torch names it."""
    config = json.loads((base / "config.json").read_text())
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def layer_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """What attention and MLP are made of, by name, in a layer of the usual parts; nothing for any other module."""
    parts = dict(layer.named_children())
    if parts.keys() != _LAYER_PARTS:
        return {}
    return {**dict(parts["self_attn"].named_children()), **dict(parts["mlp"].named_children())}


def keep_narrow(causal_lm: Any, checkpoint: Checkpoint, sites: Sequence[str]) -> None:
    """Narrows what may be: weights of a base stored in bfloat16, and stacks of experts stored so. On the meta device
    the same by name and dtype alone.
    """
    base_is_narrow = stored_dtype(checkpoint.base_path) == "bfloat16"
    for linear in _linears(causal_lm):
        if base_is_narrow:
            linear.weight = nn.Parameter(_narrowed(linear.weight.detach()), requires_grad=False)
        if isinstance(linear, XLoraLinear) and _experts_are_narrow(checkpoint, sites[linear.site]):
            a, b_t = _narrowed(linear.get_buffer("lora_a")), _narrowed(linear.get_buffer("lora_b_t"))
            if a.dtype == b_t.dtype:
                linear.lora_a, linear.lora_b_t = a, b_t


def _linears(causal_lm: Any) -> list[Any]:
    found: list[Any] = []
    for module in causal_lm.modules():
        inner = layer_modules(module)
        found += [inner[name] for name in LAYER_LINEARS if _is_plain(inner.get(name))]
    embeddings, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if found and _is_plain(head) and head.weight is not getattr(embeddings, "weight", None):
        found.append(head)
    return found


def _is_plain(module: object) -> bool:
    return isinstance(module, XLoraLinear | PlainLinear) or type(module) is nn.Linear  # the last on the meta device


def _experts_are_narrow(checkpoint: Checkpoint, site: str) -> bool:
    present = [expert.weights[site] for expert in checkpoint.experts if site in expert.weights]
    return all(
        weights.a.dtype == weights.b.dtype == torch.bfloat16 and math.frexp(weights.scale)[0] == 0.5
        for weights in present
    )


def _narrowed(tensor: Tensor) -> Tensor:
    """In bfloat16 if every value survives it, else as it is. By blocks, for a copy of all of it costs new memory."""
    narrow = torch.empty_like(tensor, dtype=torch.bfloat16)
    if not tensor.is_meta:
        flat, wide = narrow.view(-1), tensor.reshape(-1)
        for first in range(0, wide.numel(), WIDENED_AT_ONCE):
            some = wide[first : first + WIDENED_AT_ONCE]
            if not torch.equal(flat[first : first + WIDENED_AT_ONCE].copy_(some).float(), some):
                return tensor
    return narrow
