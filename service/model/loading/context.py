"""The context length of a base, by its config.json.

Knows the RoPE fields that extend it; the rotations themselves are transformers' (rope.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from service.contract.errors import CheckpointError

MIN_TOKENS, MAX_TOKENS = 2, 1 << 30  # a prompt and an answer; more than any memory holds


@dataclass(frozen=True, slots=True)
class Context:
    """Context lengths of a base: the default, and the largest that --max-model-len may ask for."""

    default_tokens: int
    max_tokens: int


def read_context(config: PretrainedConfig) -> Context:
    """The context of a base. Raises CheckpointError for an impossible length.

    `max_position_embeddings` is often the length before RoPE was scaled:
    - yarn: the factor is the ratio of the two lengths, so the context is `factor * original_max_position_embeddings`
      (which transformers takes from max_position_embeddings if it is missing);
    - llama3: the factor is no such ratio (Llama 3.2: 32 * 8192, but trained for 131072), and is used only where the
      stated length equals the original one;
    - linear: like yarn if an original length is given. If not, some bases state the longer length (Gemma 3, DeepSeek
      Coder) and some the original one (Vicuna 16k), so the operator must ask for more than the stated length.
    """
    text_config = config.get_text_config()
    stated = getattr(text_config, "max_position_embeddings", None)
    if type(stated) is not int or not MIN_TOKENS <= stated <= MAX_TOKENS:
        expected = f"expected a whole number from {MIN_TOKENS} to {MAX_TOKENS}"
        source = f"{config.name_or_path}/config.json"
        raise CheckpointError(f"{source}: max_position_embeddings: {expected}, found {stated!r:.40}")
    rope: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {}  # if by layer type, no RoPE is scaled
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    scaled = _scaled(rope.get("factor"), stated if original is None else original)
    if kind == "yarn" or (kind == "linear" and original is not None) or (kind == "llama3" and original == stated):
        return Context(max(stated, scaled), max(stated, scaled))
    return Context(stated, max(stated, scaled) if kind == "linear" else stated)


def _scaled(factor: Any, original: Any) -> int:
    """The scaled length; 0 for values that are no numbers, which the checks of the rotations refuse."""
    if not isinstance(factor, int | float) or not isinstance(original, int):
        return 0
    return int(min(factor * original, MAX_TOKENS))
