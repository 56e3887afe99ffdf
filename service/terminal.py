"""Experts in the terminal: their colours, a legend, and tables of weights. Knows rich, and no engine."""

from __future__ import annotations

import itertools
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


def leader(weights: npt.NDArray[np.float32]) -> int | None:
    """The expert with the largest weight; None where no expert acts."""
    return int(weights.argmax()) if weights.any() else None


def spans_table(tokens: Sequence[str], experts: Sequence[str], mean: npt.NDArray[np.float32]) -> list[str]:
    """Lines without colours: consecutive tokens with the same leading expert, and the mean of their weights [T, E]."""
    widths = [max(len(name), 4) for name in experts]
    names = "  ".join(name.rjust(width) for name, width in zip(experts, widths, strict=True))
    lines = [f"tokens  {names}  text"]
    end = 0
    for _, group in itertools.groupby(map(leader, mean)):
        start, end = end, end + len(list(group))
        weights = mean[start:end].mean(axis=0).tolist()
        numbers = "  ".join(f"{weight:.2f}".rjust(width) for weight, width in zip(weights, widths, strict=True))
        lines.append(f"{end - start:6}  {numbers}  {''.join(tokens[start:end])!r}")
    return lines


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
    for text, weights, nats in zip(tokens, mean, entropy.tolist(), strict=True):
        first = leader(weights)
        cells = [
            Text(f"{bar(weight)} {weight:.2f}", style=style) for weight, style in zip(weights, styles, strict=True)
        ]
        shown = "" if math.isnan(nats) else f"{nats:.2f}"
        table.add_row(Text(repr(text)[1:-1] or "·", style="" if first is None else styles[first]), *cells, shown)
    return table
