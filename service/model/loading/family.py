"""Checks that a decoder family can be served exactly, before its weights are loaded.

Runs the base's modules once on the meta device (probe.py). Knows the assumptions of our attention and our KV cache; has
no list of families.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PretrainedConfig

from service.checkpoint.defects import naming
from service.contract.errors import CheckpointError
from service.model.attention.paged import HARMLESS, KNOWN
from service.model.loading.context import read_context
from service.model.loading.probe import Probe, probe
from service.model.loading.rope import refuse_broken_rope, refuse_length_dependent_rope

CANARY = "kv_cache"  # if it reaches attention, so do all keyword arguments
TOKENS = 2
POSITIVE = {"scaling": "scaling", "sliding_window": "window", "softcap": "softcap"}  # transformers' names: our names
SUPPORTED = "supported: decoders with ordinary causal attention in every layer, as Llama, Qwen, Gemma and Mistral"
# The masks that we support; other types have other masks, or no attention at all.
LAYER_TYPES = {"full_attention", "sliding_attention"}


def kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """The number of KV heads and their dimension, by config.json. In a base that is served, all layers have these."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def refuse_unservable(skeleton: Any, base: Path) -> None:
    """Raises CheckpointError for a base that cannot be served exactly with any weights."""
    refuse_length_dependent_rope(skeleton.config, str(base))
    with naming(base / "config.json", "the decoder cannot be run", SUPPORTED):
        refuse_broken_rope(skeleton, base)
        refuse_unsupported(skeleton, base)
    read_context(skeleton.config)


def refuse_unsupported(skeleton: Any, base: Path) -> None:
    """Raises CheckpointError for a family that cannot be served exactly. `skeleton` is on the meta device."""
    config: PretrainedConfig = skeleton.config.get_text_config()
    if config.is_encoder_decoder or skeleton.base_model is skeleton:
        _refuse(base, "it is not a decoder with a language model's head")
    if not skeleton._supports_attention_backend:
        _refuse(base, "its attention does not go through transformers' attention interface")
    if other := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        _refuse(base, f"it has layers of the type {', '.join(sorted(other))}")
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Conv1d):
            _refuse(base, f"{name} mixes tokens outside attention")
        if getattr(module, "is_causal", True) is False and hasattr(module, "layer_idx"):
            _refuse(base, f"{name} looks ahead")
    if hasattr(skeleton, "set_experts_implementation"):
        skeleton.set_experts_implementation("batched_mm")  # routes without reading values, which meta tensors lack
    ids = torch.zeros(TOKENS, dtype=torch.int64, device="meta")
    try:
        found = probe(skeleton, ids, ids, **{CANARY: True})
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return  # the forward depends on values, so this check would need the weights
    _check_calls(found, config, base)


def _check_calls(found: Probe, config: PretrainedConfig, base: Path) -> None:
    if unknown := {name for call in found.calls for name in call.arguments} - HARMLESS - KNOWN - {CANARY}:
        _refuse(base, f"its attention uses {', '.join(sorted(unknown))}")
    numbers = [(name, getattr(call, field)) for call in found.calls for name, field in POSITIVE.items()]
    if meaningless := {f"{name} {n!r:.40}" for name, n in numbers if n is not None and not 0 < n < math.inf}:
        _refuse(base, f"its attention uses {', '.join(sorted(meaningless))}")
    if not found.decoder_called:
        _refuse(base, "its head does not read the last hidden state of the whole decoder")
    if not all(CANARY in call.arguments for call in found.calls):
        _refuse(base, "it does not pass keyword arguments on to its attention")
    heads, head_dim = kv_shape(config)
    for layer in range(config.num_hidden_layers):
        shapes = [call.shape for call in found.calls if call.layer == layer]
        if len(shapes) != 1:
            times = f"attends {len(shapes)} times" if shapes else "does not attend"
            _refuse(base, f"layer {layer} {times} through transformers' attention interface")
        if shapes[0] != (heads, head_dim, head_dim):
            caches = f"{shapes[0][0]} heads with keys of {shapes[0][1]} and values of {shapes[0][2]}"
            _refuse(base, f"layer {layer} caches {caches}, not {heads} heads of {head_dim} as config.json says")


def _refuse(base: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{base}/config.json: this decoder family cannot be served exactly: {reason}", hint=SUPPORTED)
