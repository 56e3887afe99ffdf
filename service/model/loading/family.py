"""Whether a decoder family can be served exactly, found out before its weights are loaded.

The base's modules are built on the meta device and run once with an attention that only writes down how it was called.
Knows what our attention and our KV cache take for granted; has no list of families.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from service.checkpoint.defects import naming
from service.contract.errors import CheckpointError
from service.model.attention.paged import HARMLESS, KNOWN
from service.model.loading.rope import refuse_broken_rope, refuse_length_dependent_rope

PROBE = "xlora_probe"
MIN_CONTEXT, MAX_CONTEXT = 2, 1 << 30  # tokens: a prompt and an answer; what memory could ever hold
CANARY = "kv_cache"  # stands for all that travels to the attention as keyword arguments
TOKENS = 2
POSITIVE = {"scaling", "sliding_window", "softcap"}  # arguments of the attention
SUPPORTED = "supported: decoders with ordinary causal attention in every layer, as Llama, Qwen, Gemma and Mistral"
# The masks that we make; other types are other masks, or no attention at all.
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass
class _Calls:
    """What the decoder's layers asked of the attention function."""

    shapes: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)  # layer -> KV heads, key dim, value dim
    unknown: set[str] = field(default_factory=set)
    decoder_called: bool = False  # as a whole, so that its last hidden state can be kept
    meaningless: set[str] = field(default_factory=set)  # arguments with values that no attention has
    lost: bool = False  # the forward's own keyword arguments did not arrive, so KV metadata cannot


def build_skeleton(base: Path, dtype: torch.dtype | None = None) -> Any:
    """The base's modules without weights, in `dtype` (None: the base's own). Raises CheckpointError for an architecture
    that is no causal LM here, and for fields of config.json that transformers cannot build it with.
    """
    with naming(base / "config.json", "transformers knows no causal language model for it", SUPPORTED):
        config = read_config(base)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False, dtype=config.dtype if dtype is None else dtype
            )


def read_config(base: Path) -> PretrainedConfig:
    """config.json as transformers reads it, whatever attention it names: ours takes its place, and one of the hub would
    be downloaded and run.
    """
    config: PretrainedConfig = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = "eager"
    return config


def checked_skeleton(base: Path, dtype: torch.dtype | None = None) -> Any:
    """The same of a base that can be served exactly. Raises CheckpointError for others."""
    skeleton = build_skeleton(base, dtype)
    refuse_unservable(skeleton, base)
    return skeleton


def refuse_unservable(skeleton: Any, base: Path) -> None:
    """Raises CheckpointError for a base that cannot be served exactly, whatever its weights are."""
    refuse_length_dependent_rope(skeleton.config, str(base))
    with naming(base / "config.json", "the decoder cannot be run", SUPPORTED):
        refuse_broken_rope(skeleton, base)
        refuse_unsupported(skeleton, base)
    context = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if type(context) is not int or not MIN_CONTEXT <= context <= MAX_CONTEXT:
        expected = f"expected a whole number from {MIN_CONTEXT} to {MAX_CONTEXT}"
        raise CheckpointError(f"{base}/config.json: max_position_embeddings: {expected}, found {context!r:.40}")


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
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return  # a step that depends on values: only the weights can tell more
    _check_calls(calls, config, base)


def _check_calls(calls: _Calls, config: PretrainedConfig, base: Path) -> None:
    if calls.unknown:
        _refuse(base, f"its attention uses {', '.join(sorted(calls.unknown))}")
    if calls.meaningless:
        _refuse(base, f"its attention uses {', '.join(sorted(calls.meaningless))}")
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
        positive = {name: kwargs[name] for name in POSITIVE & given}
        calls.meaningless |= {f"{name} {value!r:.40}" for name, value in positive.items() if not 0 < value < math.inf}
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
    raise CheckpointError(f"{base}/config.json: this decoder family cannot be served exactly: {reason}", hint=SUPPORTED)
