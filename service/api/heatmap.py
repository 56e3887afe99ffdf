"""Heat maps of weights [rows, experts] as SVG, written here, and as PNG, drawn by matplotlib where it is installed.

Rows run down the page, experts across. This file knows labels and numbers; it knows no gate and no HTTP.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import threading
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from service.api.rows import FloatArray
from service.errors import InvalidRequestError

MAX_ROWS = 1024
MAX_CELLS = 8192

# Eleven colours of matplotlib's viridis, evenly spaced: even in lightness, readable by the colour-blind.
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140)),
        *((34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37)),
    ],
    np.float64,
)
_CELL_WIDTH, _CELL_HEIGHT = 44, 18  # pixels
_CHARACTER_WIDTH = 6.7  # pixels, of 11 px monospace
_LABEL_CHARACTERS, _EXPERT_CHARACTERS = 44, 20
_CONTROL = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·"}

_drawing = threading.Lock()  # matplotlib is not made for threads


def check_size(rows: int, experts: int) -> None:
    """Raises InvalidRequestError for more than an image should have."""
    if rows <= MAX_ROWS and rows * experts <= MAX_CELLS:
        return
    raise InvalidRequestError(
        f"a heat map of {rows} rows and {experts} experts is over the limit of {MAX_ROWS} rows and {MAX_CELLS} cells",
        param="select",
        code="too_large",
        hint="take fewer positions or experts with `select`, or another format",
    )


def check_matplotlib() -> None:
    """Raises InvalidRequestError where PNG cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequestError(
            "this server has no matplotlib, which draws PNG",
            param="format",
            code="plot_unavailable",
            hint="take format svg, or install it on the server: pip install 'xlora-service[plot]'",
        )


def token_labels(start: int, pieces: Sequence[str]) -> list[str]:
    """Of rows that are tokens: position and text."""
    return [f"{start + row}│{piece}" for row, piece in enumerate(pieces)]


def svg(title: str, labels: Sequence[str], experts: Sequence[str], weights: FloatArray) -> bytes:
    """The map with the numbers in its cells. weights: [rows, experts]."""
    labels = [_shown(label, _LABEL_CHARACTERS) for label in labels]
    names = [_shown(name, _EXPERT_CHARACTERS) for name in experts]
    low, high = _range(weights)
    left = round(16 + _CHARACTER_WIDTH * max(map(len, labels)))
    top = round(44 + _CHARACTER_WIDTH * 0.71 * max(map(len, names)))
    right, bottom = left + _CELL_WIDTH * len(names), top + _CELL_HEIGHT * len(labels)
    tail = round(_CHARACTER_WIDTH * 0.71 * len(names[-1]))  # the last name leans over the edge
    width = max(right + 16 + tail, left + 240, round(24 + 7.5 * len(title)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{bottom + 44}" '
        f'viewBox="0 0 {width} {bottom + 44}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{bottom + 44}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="12" font-weight="bold" fill="#111111">{escape(title)}</text>',
        *_columns(names, left, top),
        *_cells(labels, names, weights, (low, high), (left, top)),
        *_legend(low, high, left, bottom + 14),
        "</svg>",
    ]
    return "\n".join(parts).encode()


def png(title: str, labels: Sequence[str], experts: Sequence[str], weights: FloatArray) -> bytes:
    """The map with a colour bar. weights: [rows, experts]."""
    with _drawing:
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
        axes.set_title(_drawable(_shown(title, 200), drawable).replace("·", " "), loc="left", pad=8, **text)
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


def _columns(names: Sequence[str], left: int, top: int) -> Iterator[str]:
    for column, name in enumerate(names):
        x, y = left + _CELL_WIDTH * (column + 0.5), top - 6
        yield f'<text transform="translate({x:g} {y}) rotate(-45)" fill="#111111">{escape(name)}</text>'


def _cells(
    labels: Sequence[str],
    names: Sequence[str],
    weights: FloatArray,
    limits: tuple[float, float],
    corner: tuple[int, int],
) -> Iterator[str]:
    low, high = limits
    left, top = corner
    for row, label in enumerate(labels):
        y = top + _CELL_HEIGHT * row
        yield f'<text x="{left - 8}" y="{y + 13}" text-anchor="end" fill="#111111">{escape(label)}</text>'
        for column, name in enumerate(names):
            weight = float(weights[row, column])
            fill, ink = _colours((weight - low) / (high - low))
            x, middle = left + _CELL_WIDTH * column, left + _CELL_WIDTH * (column + 0.5)
            yield (
                f"<g><title>{escape(f'{label}, {name}: {weight:.4f}')}</title>"
                f'<rect x="{x}" y="{y}" width="{_CELL_WIDTH}" height="{_CELL_HEIGHT}" fill="{fill}"/>'
                f'<text x="{middle:g}" y="{y + 13}" text-anchor="middle" fill="{ink}">{weight:.2f}</text></g>'
            )


def _legend(low: float, high: float, left: int, y: int) -> Iterator[str]:
    """A bar of colours from the lowest to the highest weight."""
    for step in range(40):
        fill, _ = _colours(step / 39)
        yield f'<rect x="{left + 3 * step}" y="{y}" width="3" height="10" fill="{fill}"/>'
    yield f'<text x="{left - 8}" y="{y + 9}" text-anchor="end" fill="#111111">{low:.3g}</text>'
    yield f'<text x="{left + 126}" y="{y + 9}" fill="#111111">{high:.3g} weight</text>'


def _colours(share: float) -> tuple[str, str]:
    """Fill and ink of a cell at a share 0 to 1 of the range."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    red, green, blue = (round(float(np.interp(place, range(len(_VIRIDIS)), channel))) for channel in _VIRIDIS.T)
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if share < 0.43 else "#000000"


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
    """What matplotlib's own font has; a character it lacks is a warning and a box."""
    manager = importlib.import_module("matplotlib.font_manager")
    font = manager.get_font(manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def _drawable(text: str, drawable: frozenset[int]) -> str:
    return "".join(one if ord(one) in drawable else "�" for one in text)
