"""How drafts are trained, and how far a run has come. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OnProgress = Callable[[str, int, int], None]  # what is done, how much of it, of how much; 0 where nobody knows


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is asked for."""

    max_tokens: int  # to be written after each prompt
    depth: int = 4  # tokens that are drafted in all; 1: by the head alone
    head_size: int | None = None  # R of the draft head; None: by the base's width
    layer_size: int | None = None  # R of the draft layer; None: by the base's width
    head_steps: int = 1500
    layer_steps: int = 3000
    seed: int = 0


def suitable_head_size(hidden_size: int) -> int:
    """R of a draft head for a model of that width: an eighth, but 64 at least, or the whole of a smaller model."""
    return min(hidden_size, max(64, hidden_size // 8))


def suitable_layer_size(hidden_size: int) -> int:
    """R of a draft layer for a model of that width: twice of it, up to 2,048."""
    return min(2 * hidden_size, max(2048, hidden_size))
