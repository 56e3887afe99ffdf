"""Selects weights for bfloat16 storage under float32 arithmetic, where bfloat16 holds them without loss.

That halves their memory, and the bytes that a decode step reads, which take most of its time. Results are the same up
to rounding. The kernels upcast as they read (csrc/linear.h); torch's operators cannot compute with such weights.
Candidates are chosen by name before loading; a weight is stored in bfloat16 only if its values survive the conversion
(model/loading/passes.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from service.checkpoint import Checkpoint
from service.model.adapted import AdaptedModule
from service.model.xlora_model import XLoraModel
from service.native.decoder import Decoder


def bfloat16_candidates(checkpoint: Checkpoint) -> set[str]:
    """Names of the base's linears whose weights a native step can read in bfloat16; none of a base with another
    architecture than Llama's.
    """
    causal_lm, decoder = Decoder.of_base(checkpoint.base_path)
    if decoder is None:
        return set()
    tied = getattr(decoder.embed, "weight", None)
    found = {id(linear) for linear in decoder.linears if linear.weight is not tied}
    return {name for name, module in causal_lm.named_modules() if id(module) in found}


def bfloat16_tensors(model: XLoraModel, checkpoint: Checkpoint) -> list[Tensor]:
    """The tensors of a model on the meta device that will be stored in bfloat16, as far as the files' dtypes tell."""
    decoder = Decoder.candidate(model.causal_lm)
    if decoder is None or not bfloat16_candidates(checkpoint):
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
    """Whether the experts of a site are bfloat16 in their files, and still exact after their scales are folded in."""
    present = [expert.weights[site] for expert in checkpoint.experts if site in expert.weights]
    return all(
        weights.a.dtype == weights.b.dtype == torch.bfloat16 and math.frexp(weights.scale)[0] == 0.5
        for weights in present
    )
