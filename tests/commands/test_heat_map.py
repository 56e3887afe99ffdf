"""The heat map of `xlora-serve scalings --png`: what is drawn, and what is refused."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest

from service.commands import heat_map
from service.contract.errors import StartupError

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed: pip install '.[plot]'"
)
LABELS = ["&<>\"'", "$\\frac$", "$_x^2$", "\x00\x1b\ufffe\u202e\ue000", "漢字 שלום 🙂", "", "long " * 40]


@needs_matplotlib
def test_any_label_can_be_drawn() -> None:
    """matplotlib reads mathematics between dollars, and warns of characters that its font lacks."""
    weights = np.linspace(-1, 3, 2 * len(LABELS), dtype=np.float32).reshape(-1, 2)
    assert heat_map.png("<&$title", heat_map.token_labels(LABELS), ["$&", "x" * 99], weights).startswith(b"\x89PNG")


@needs_matplotlib
def test_the_cells_have_the_colours_of_their_weights() -> None:
    import matplotlib
    from matplotlib.image import imread

    weights = np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3)
    drawn = heat_map.png("weights", list("abcd"), ["math", "code", "tales"], weights)
    image = imread(io.BytesIO(drawn), format="png")[:, :, :3]
    for weight in weights.ravel():
        colour = matplotlib.colormaps["viridis"](float(weight))[:3]
        assert (np.abs(image - colour).max(axis=2) < 0.01).sum() > 100, weight


@pytest.mark.parametrize(("rows", "experts"), [(1025, 1), (1024, 9), (3, 8192)])
def test_a_map_that_would_be_too_large_is_refused(rows: int, experts: int) -> None:
    heat_map.check_size(1024, 8)
    with pytest.raises(StartupError, match=f"{rows} rows and {experts} experts is over the limit") as raised:
        heat_map.check_size(rows, experts)
    assert raised.value.hint == "give a shorter --prompt"
