"""ExpertStack: the experts of one site as two matrices, so that any number of experts costs two matrix products.

    y = W x + B_cat((A_cat x) * g)        A_cat [R, in], B_cat [out, R], R = sum of the experts' ranks at this site

The experts' scales (lora_alpha / r) are folded into B_cat. An expert that does not target the site has rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.checkpoint import Expert
from service.checkpoint.weights.tensors import StoredTensor
from service.model.dtypes import bfloat16_if_lossless


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """A_cat, B_cat transposed, and each expert's rank in them."""

    a: Tensor  # [R, in]
    b_t: Tensor  # [R, out], B_cat transposed and contiguous, as addmm reads it
    ranks: list[int]  # [E]


def stack_experts(
    experts: Sequence[Expert], site: str, dtype: torch.dtype, device: torch.device, *, try_bfloat16: bool = False
) -> ExpertStack:
    """Stacks every expert's A and B at `site`; scales are folded into B in fp32 before the cast to `dtype`. With
    `try_bfloat16` both are stored in bfloat16 where that is lossless for both.
    """
    present = [expert.weights[site] for expert in experts if site in expert.weights]
    a = torch.cat([_read(weights.a, device).float() for weights in present])
    b_t = torch.cat([_read(weights.b, device).float().T * weights.scale for weights in present])
    ranks = [expert.weights[site].a.shape[0] if site in expert.weights else 0 for expert in experts]
    a, b_t = a.to(device, dtype).contiguous(), b_t.to(device, dtype).contiguous()
    both = (bfloat16_if_lossless(a), bfloat16_if_lossless(b_t)) if try_bfloat16 else (a, b_t)
    return ExpertStack(*(both if both[0].dtype == both[1].dtype else (a, b_t)), ranks)


def _read(weights: Tensor | StoredTensor, device: torch.device) -> Tensor:
    """Reads a tensor; for the meta device only its shape."""
    if device.type == "meta":
        return torch.empty(weights.shape, dtype=weights.dtype, device=device)
    return weights[...]
