"""Experts in the terminal: their colours, a legend, and a table of weights. Knows rich, and no engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")
_BLOCKS = " ▏▎▍▌▋▊▉█"
_BAR_CHARACTERS = 8


def expert_styles(count: int) -> list[str]:
    """A style per expert; they repeat, underlined, when there are more experts than colours."""
    return [
        _COLOURS[index % len(_COLOURS)] + " underline" * (index // len(_COLOURS) % 2 == 1) for index in range(count)
    ]


def legend(experts: Sequence[str], styles: Sequence[str]) -> Text:
    """Which colour is whose."""
    return Text("  ").join(Text(f"■ {name}", style=style) for name, style in zip(experts, styles, strict=True))


def bar(weight: float) -> str:
    """A weight from 0 to 1 as a bar of eighths of a character."""
    eighths = round(min(max(weight, 0.0), 1.0) * _BAR_CHARACTERS * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BLOCKS[rest] if rest else "")).ljust(_BAR_CHARACTERS)


def scalings_table(
    tokens: Sequence[str],
    experts: Sequence[str],
    mean: npt.NDArray[np.float32],  # [tokens, E]
    entropy: npt.NDArray[np.float32],  # [tokens], nats
) -> Table:
    """A row per token, a column per expert."""
    styles = expert_styles(len(experts))
    table = Table("token", box=None, pad_edge=False)
    for name, style in zip(experts, styles, strict=True):
        table.add_column(name, header_style=style, no_wrap=True)
    table.add_column("entropy", justify="right")
    for text, weights, nats in zip(tokens, mean.tolist(), entropy.tolist(), strict=True):
        leader = max(range(len(weights)), key=weights.__getitem__)
        cells = [Text(f"{bar(weight)} {weight:.2f}", style=styles[index]) for index, weight in enumerate(weights)]
        shown = "" if math.isnan(nats) else f"{nats:.2f}"
        table.add_row(Text(repr(text)[1:-1] or "·", style=styles[leader]), *cells, shown)
    return table
