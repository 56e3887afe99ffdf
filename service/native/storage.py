"""Weights that bfloat16 holds without loss are kept in bfloat16 under float32 arithmetic: half the memory, and half of
what a decode step reads, which is most of its time. Results are the same up to rounding.

The kernels widen them as they read (csrc/linear.h); torch's operators cannot compute with them. Names of linears tell
what may be kept so, which is known before anything is loaded; values decide, when each of them is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from service.checkpoint import Checkpoint
from service.model.adapted import AdaptedModule
from service.model.xlora_model import XLoraModel
from service.native.decoder import Decoder


def names_of_linears(checkpoint: Checkpoint) -> set[str]:
    """The linears of a checkpoint's base whose weights a native step can read in bfloat16; none where the base computes
    anything but Llama's formula.
    """
    causal_lm, decoder = Decoder.of_base(checkpoint.base_path)
    if decoder is None:
        return set()
    tied = getattr(decoder.embed, "weight", None)
    found = {id(linear) for linear in decoder.linears if linear.weight is not tied}
    return {name for name, module in causal_lm.named_modules() if id(module) in found}


def expect_bfloat16(model: XLoraModel, checkpoint: Checkpoint) -> list[Tensor]:
    """The tensors of a model on the meta device that will be kept so, as far as stored dtypes tell."""
    decoder = Decoder.outline(model.causal_lm)
    if decoder is None or not names_of_linears(checkpoint):
        return []
    tied, tensors = getattr(decoder.embed, "weight", None), []
    is_bfloat16 = checkpoint.base_dtypes == {torch.bfloat16}
    for linear in decoder.linears:
        if linear.weight is tied:
            continue
        if is_bfloat16:
            tensors.append(linear.weight)
        if isinstance(linear, AdaptedModule) and _are_bfloat16(checkpoint, model.sites[linear.site]):
            tensors += [linear.lora_a, linear.lora_b_t]
    return tensors


def _are_bfloat16(checkpoint: Checkpoint, site: str) -> bool:
    """Whether the experts of a site are, and stay so when their scales are folded in."""
    present = [expert.weights[site] for expert in checkpoint.experts if site in expert.weights]
    return all(
        weights.a.dtype == weights.b.dtype == torch.bfloat16 and math.frexp(weights.scale)[0] == 0.5
        for weights in present
    )
