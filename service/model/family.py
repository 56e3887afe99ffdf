"""Whether a decoder family can be served exactly, found out before its weights are loaded.

The base's modules are built on the meta device and run once with an attention that only writes down how it was called.
Knows what our attention and our KV cache take for granted; has no list of families.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from service.errors import CheckpointError
from service.model.attention import HARMLESS, KNOWN

PROBE = "xlora_probe"
CANARY = "kv_cache"  # stands for all that travels to the attention as keyword arguments
TOKENS = 2
# The masks that we make; other types are other masks, or no attention at all.
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass
class _Calls:
    """What the decoder's layers asked of the attention function."""

    shapes: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)  # layer -> KV heads, key dim, value dim
    unknown: set[str] = field(default_factory=set)
    decoder_called: bool = False  # as a whole, so that its last hidden state can be kept
    lost: bool = False  # the forward's own keyword arguments did not arrive, so KV metadata cannot


def build_skeleton(base: Path, dtype: torch.dtype | None = None) -> Any:
    """The base's modules without weights, in `dtype` (None: the base's own). Raises CheckpointError for an architecture
    that is no causal LM here.
    """
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False, dtype=config.dtype if dtype is None else dtype
            )
    except (ValueError, KeyError, OSError) as error:  # an unknown model_type, remote code
        _refuse(base, f"transformers knows no causal language model for it: {str(error).splitlines()[0]}")


def refuse_unsupported(skeleton: Any, base: Path) -> None:
    """Raises CheckpointError where a family cannot be served exactly. `skeleton` is on the meta device."""
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
    try:
        calls = _record(skeleton)
    except (NotImplementedError, RuntimeError):  # a step that depends on values: only the weights can tell more
        return
    _check_calls(calls, config, base)


def _check_calls(calls: _Calls, config: PretrainedConfig, base: Path) -> None:
    if calls.unknown:
        _refuse(base, f"its attention uses {', '.join(sorted(calls.unknown))}")
    if not calls.decoder_called:
        _refuse(base, "its head does not read the last hidden state of the whole decoder")
    if calls.lost:
        _refuse(base, "it does not pass keyword arguments on to its attention")
    for layer in range(config.num_hidden_layers):
        if len(calls.shapes.get(layer, ())) != 1:
            times = "does not attend" if layer not in calls.shapes else f"attends {len(calls.shapes[layer])} times"
            _refuse(base, f"layer {layer} {times} through transformers' attention interface")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer, (shape,) in calls.shapes.items():
        if shape != (heads, head_dim, head_dim):
            found = f"{shape[0]} heads with keys of {shape[1]} and values of {shape[2]}"
            _refuse(base, f"layer {layer} caches {found}, not {heads} heads of {head_dim} as config.json says")


def _record(skeleton: Any) -> _Calls:
    """Runs two tokens through the skeleton; nothing is computed."""
    calls = _Calls()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            calls.shapes.setdefault(layer, []).append((key.shape[1], key.shape[3], value.shape[3]))
        given = {name for name, argument in kwargs.items() if argument is not None}
        calls.lost |= CANARY not in given
        calls.unknown |= given - HARMLESS - KNOWN - {CANARY}
        if attention_mask is not None:
            calls.unknown.add("a mask of its own")
        return query.new_empty(1, TOKENS, query.shape[1], value.shape[3]), None

    AttentionInterface.register(PROBE, attention)
    skeleton.set_attn_implementation(PROBE)
    if hasattr(skeleton, "set_experts_implementation"):
        skeleton.set_experts_implementation("batched_mm")  # routes without looking at values
    decoder = getattr(skeleton, skeleton.base_model_prefix)
    decoder.register_forward_hook(lambda *_: setattr(calls, "decoder_called", True))
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    skeleton(input_ids=ids, position_ids=ids, use_cache=False, **{CANARY: True})
    return calls


def _refuse(base: Path, reason: str) -> NoReturn:
    raise CheckpointError(
        f"{base}/config.json: this decoder family cannot be served exactly: {reason}",
        hint="supported: decoders with ordinary causal attention in every layer, as Llama, Qwen, Gemma and Mistral",
    )
