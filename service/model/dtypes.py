"""Conversions between float32 and bfloat16 storage. Knows tensors, not which of them may be converted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK = 1 << 20  # elements converted at once: a converted copy of a large weight would cost as much memory again


def bfloat16_if_lossless(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16 if all its values survive the conversion, else the tensor itself."""
    flat = tensor.view(-1)
    blocks = (flat[first : first + _BLOCK] for first in range(0, flat.numel(), _BLOCK))
    if all(torch.equal(block.to(torch.bfloat16).float(), block) for block in blocks):
        return tensor.to(torch.bfloat16)
    return tensor


def upcast_to_float32(module: nn.Module) -> None:
    """Converts every bfloat16 parameter and buffer of a module, one after the other; tied ones stay tied."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.float()
