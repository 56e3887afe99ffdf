"""RoPE whose frequencies depend on the length of the text: fixes them once for all texts, or refuses the base.

transformers chooses such frequencies by the longest row of each forward. So one request's long prompt would change the
tokens of all others, and cached keys would have other rotations than new ones. Knows transformers' rotary modules, and
nothing of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from service.contract.errors import CheckpointError
from service.model.loading.context import read_context

_FIXED = "default"  # the type of a rotary module that never changes its frequencies


def refuse_length_dependent_rope(config: PretrainedConfig, source: str) -> None:
    """Raises CheckpointError for RoPE that has other frequencies at every length ("dynamic")."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)]  # as Gemma 3 has it
    if "dynamic" in {one.get("rope_type", "default") for one in (rope, *per_layer_type)}:
        raise CheckpointError(
            f"{source}/config.json: rope_type 'dynamic': rotations depend on the longest row of a batch",
            hint="supported: default, linear, yarn, llama3, longrope",
        )


def refuse_broken_rope(skeleton: PreTrainedModel, base: Path) -> None:
    """Raises CheckpointError for RoPE whose frequencies are not finite. `skeleton` is on the meta device; its rotary
    modules are built again on the CPU.
    """
    for module in skeleton.modules():
        if hasattr(module, "rope_type"):
            rotary = type(module)(module.config)
            if not all(buffer.isfinite().all() for buffer in rotary.buffers()):
                found = f"{skeleton.config.get_text_config().rope_parameters!r:.200}"
                raise CheckpointError(
                    f"{base}/config.json: rope_parameters: expected ones with finite frequencies, found {found}"
                )


def fix_longrope(
    causal_lm: PreTrainedModel, max_model_len: int | None, on_progress: Callable[[str], None] = lambda _: None
) -> None:
    """Fixes the frequencies of "longrope" modules for all texts: the short factors if no text can be longer than the
    original training length, else the long factors.

    transformers switches within a text, once it exceeds that length; cached keys cannot follow.
    """
    length = max_model_len or read_context(causal_lm.config).default_tokens
    for module in causal_lm.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds == "longrope":
            on_progress(_fix(module, None, length))
            module.rope_type = _FIXED  # type: ignore[assignment]
        elif isinstance(kinds, dict) and "longrope" in kinds.values():
            for layer_type in [name for name, kind in kinds.items() if kind == "longrope"]:
                on_progress(_fix(module, layer_type, length))
            module.rope_type = {  # type: ignore[assignment]
                name: _FIXED if kind == "longrope" else kind for name, kind in kinds.items()
            }


def _fix(module: nn.Module, layer_type: str | None, length: int) -> str:
    """Sets the frequencies for `length` tokens in a rotary module, or in one of its layer types. Returns a line of
    progress about the choice.
    """
    parameters = module.config.rope_parameters  # type: ignore[union-attr]
    parameters = parameters if layer_type is None else parameters[layer_type]  # type: ignore[index]
    original: int = parameters["original_max_position_embeddings"]  # type: ignore[index, assignment]
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    frequencies: torch.Tensor = getattr(module, name)
    of_length, _ = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, frequencies.device, seq_len=length, layer_type=layer_type
    )
    frequencies.copy_(of_length)
    if length <= original:
        return f"longrope: short factors, for texts of up to {original} tokens"
    return f"longrope: long factors for all texts; --max-model-len {original} takes the short ones"
