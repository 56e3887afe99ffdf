"""The context of a base: how many tokens a text may have, as config.json says it.

Knows the fields of RoPE that lengthen it; the rotations themselves are transformers' (rope.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from service.contract.errors import CheckpointError

MIN_TOKENS, MAX_TOKENS = 2, 1 << 30  # a prompt and an answer; what memory could ever hold


@dataclass(frozen=True, slots=True)
class Context:
    """Tokens of a text: as many as the base is certainly made for, and as many as an operator may ask for."""

    usual: int
    most: int


def read_context(config: PretrainedConfig) -> Context:
    """The context of a base. Raises CheckpointError for a length that is none.

    `max_position_embeddings` is often the length before RoPE was scaled:
    - yarn: its factor is the ratio of the two lengths, so that there are `factor * original_max_position_embeddings`
      (which transformers takes from max_position_embeddings, where it is not given);
    - llama3: its factor is no such ratio (Llama 3.2: 32 * 8192, and made for 131072), and counts only where the stated
      length is plainly the original one;
    - linear: as yarn where an original length is given. Where none is, some have stated the longer length (Gemma 3,
      DeepSeek Coder) and some the original one (Vicuna 16k), so that the operator has to ask for more than is stated.
    """
    text_config = config.get_text_config()
    stated = getattr(text_config, "max_position_embeddings", None)
    if type(stated) is not int or not MIN_TOKENS <= stated <= MAX_TOKENS:
        expected = f"expected a whole number from {MIN_TOKENS} to {MAX_TOKENS}"
        source = f"{config.name_or_path}/config.json"
        raise CheckpointError(f"{source}: max_position_embeddings: {expected}, found {stated!r:.40}")
    rope: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {}  # by layer type, nothing is lengthened
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    scaled = _scaled(rope.get("factor"), stated if original is None else original)
    if kind == "yarn" or (kind == "linear" and original is not None) or (kind == "llama3" and original == stated):
        return Context(max(stated, scaled), max(stated, scaled))
    return Context(stated, max(stated, scaled) if kind == "linear" else stated)


def _scaled(factor: Any, original: Any) -> int:
    """0 where the numbers are none: what they do to the rotations is judged with those."""
    if not isinstance(factor, int | float) or not isinstance(original, int):
        return 0
    return int(min(factor * original, MAX_TOKENS))
