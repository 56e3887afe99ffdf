"""The probe: runs a decoder once with an attention function that records its calls.

family.py probes a base on the meta device, where nothing is computed. native/decoder.py probes a base with or without
weights, and compares the logits with its own formula. Knows transformers' attention interface only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

PROBE = "xlora_probe"
MASK = "a mask of its own"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments with which a layer called attention; None: not given."""

    layer: int | None
    shape: tuple[int, int, int]  # KV heads, their keys' dimension, their values'
    scaling: float | None
    window: int | None  # in tokens
    softcap: float | None
    arguments: frozenset[str]  # names of all given arguments, and MASK


@dataclass(frozen=True, slots=True)
class Probe:
    """The record of one run."""

    calls: list[AttentionCall]
    decoder_called: bool  # as a module, so that its last hidden state can be tapped
    logits: Tensor  # [1, T, V]


@torch.inference_mode()
def probe(causal_lm: Any, ids: Tensor, positions: Tensor, **arguments: Any) -> Probe:
    """Runs ids [T] at positions [T]; `arguments` are the forward's own. Restores the model's attention afterwards."""
    calls: list[AttentionCall] = []
    decoders: list[nn.Module] = []  # one entry per call

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        names = {name for name, argument in (*given.items(), (MASK, mask)) if argument is not None}
        layer, shape = getattr(module, "layer_idx", None), (key.shape[1], key.shape[3], value.shape[3])
        numbers = given.get("scaling"), given.get("sliding_window"), given.get("softcap")
        calls.append(AttentionCall(layer, shape, *numbers, frozenset(names)))
        if query.is_meta:
            return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None
        return mixed(query, key, value), None

    attention = causal_lm.config._attn_implementation
    AttentionInterface.register(PROBE, record)
    hook = getattr(causal_lm, causal_lm.base_model_prefix).register_forward_hook(
        lambda decoder, *_: decoders.append(decoder)
    )
    causal_lm.set_attn_implementation(PROBE)
    try:
        output = causal_lm(input_ids=ids[None], position_ids=positions[None], use_cache=False, **arguments)
    finally:
        causal_lm.set_attn_implementation(attention)
        hook.remove()
    return Probe(calls, bool(decoders), output.logits)


def mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The probe's attention, of a row to itself only: [1, heads, T, head_dim] -> [1, T, heads, head_dim]."""
    each = query.shape[1] // key.shape[1]
    return (query * key.repeat_interleave(each, 1) + value.repeat_interleave(each, 1)).transpose(1, 2)
