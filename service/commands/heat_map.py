"""A heat map of weights [rows, experts] as a PNG, drawn by matplotlib, which is an extra.

Rows run down the picture, experts across. This file knows labels and numbers; it knows no gate.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from service.api.gate_views.rows import FloatArray
from service.contract.errors import StartupError

MAX_ROWS = 1024
MAX_CELLS = 8192

_LABEL_CHARACTERS, _EXPERT_CHARACTERS, _TITLE_CHARACTERS = 44, 20, 200
_CONTROL = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·"}


def check_matplotlib() -> None:
    """Raises StartupError where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise StartupError("--png needs matplotlib", hint="pip install 'xlora-service[plot]'")


def check_size(rows: int, experts: int) -> None:
    """Raises StartupError for more than an image should have."""
    if rows > MAX_ROWS or rows * experts > MAX_CELLS:
        raise StartupError(
            f"a heat map of {rows} rows and {experts} experts is over the limit of {MAX_ROWS} rows "
            f"and {MAX_CELLS} cells",
            hint="give a shorter --prompt",
        )


def token_labels(texts: Sequence[str]) -> list[str]:
    """Of rows that are tokens: position and text."""
    return [f"{row}│{text}" for row, text in enumerate(texts)]


def png(title: str, labels: Sequence[str], experts: Sequence[str], weights: FloatArray) -> bytes:
    """The map with a colour bar. weights: [rows, experts]."""
    figures = importlib.import_module("matplotlib.figure")
    drawable = _drawable_characters()
    labels = [_drawable(_shown(label, _LABEL_CHARACTERS), drawable) for label in labels]
    names = [_drawable(_shown(name, _EXPERT_CHARACTERS), drawable) for name in experts]
    size = (3.0 + 0.09 * max(map(len, labels)) + 0.4 * len(names), 1.6 + 0.19 * len(labels))  # inches
    figure = figures.Figure(figsize=size, dpi=100)
    axes = figure.add_axes(_inner(size, max(map(len, labels)), len(names)))
    low, high = _range(weights)
    image = axes.imshow(weights, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high)
    text: dict[str, Any] = {"parse_math": False, "fontsize": 8}
    axes.set_title(_drawable(_shown(title, _TITLE_CHARACTERS), drawable).replace("·", " "), loc="left", pad=8, **text)
    axes.set_yticks(range(len(labels)), labels, **text)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", **text)
    bar = figure.add_axes((1 - 0.9 / size[0], 1 - 1.4 / size[1], 0.12 / size[0], 1.0 / size[1]))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _inner(size: tuple[float, float], label: int, columns: int) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the cells, as shares of the figure."""
    width, height = size
    return (0.3 + 0.09 * label) / width, 1.1 / height, 0.4 * columns / width, (height - 1.5) / height


def _range(weights: FloatArray) -> tuple[float, float]:
    """0 to 1, and further where weights are."""
    return min(0.0, float(weights.min())), max(1.0, float(weights.max()))


def _shown(text: str, characters: int) -> str:
    """A label: spaces and line breaks visible, nothing unprintable, cut in the middle where it is too long."""
    shown = "".join(_CONTROL.get(one) or (one if one.isprintable() else "�") for one in text)
    if len(shown) <= characters:
        return shown
    head = characters // 2
    return f"{shown[:head]}…{shown[head + 1 - characters :]}"


def _drawable_characters() -> frozenset[int]:
    """The characters of matplotlib's own font; one that it lacks is a warning and a box."""
    manager = importlib.import_module("matplotlib.font_manager")
    font = manager.get_font(manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def _drawable(text: str, drawable: frozenset[int]) -> str:
    return "".join(one if ord(one) in drawable else "�" for one in text)
