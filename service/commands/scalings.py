"""xlora-serve scalings: the gate's weights over a text, as a table of tokens and experts, and as a heat map."""

from __future__ import annotations

import argparse
import asyncio
import importlib
from pathlib import Path

from rich.console import Console

from service.api.rows import RowFormat, Rows
from service.api.scalings import scaling_rows
from service.api.state import new_id
from service.commands.local import local_engine, read_prompt
from service.engine.request import Request
from service.errors import StartupError
from service.terminal import scalings_table


def run(arguments: argparse.Namespace) -> int:
    """Draws the table; saves the heat map when asked for."""
    if arguments.png is not None:
        _require_matplotlib(Path(arguments.png))
    tokens, experts, rows = asyncio.run(_run(arguments))
    Console(highlight=False).print(scalings_table(tokens, experts, rows.mean, rows.entropy))
    if arguments.png is not None:
        save_heat_map(Path(arguments.png), tokens, experts, rows)
    return 0


async def _run(arguments: argparse.Namespace) -> tuple[list[str], list[str], Rows]:
    async with local_engine(arguments) as (client, codec):
        ids = await codec.prompt_ids(read_prompt(arguments))
        request = Request(new_id("cli"), ids, None, "mean", 0)
        ((rows, _),) = await scaling_rows(client, [request], RowFormat(client.info))
        return codec.pieces(ids), [expert["name"] for expert in client.info.experts], rows


def save_heat_map(path: Path, tokens: list[str], experts: list[str], rows: Rows) -> None:
    """A PNG with a column per token and a row per expert."""
    figures = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(max(4.0, 1.5 + 0.3 * len(tokens)), 1.5 + 0.4 * len(experts)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(rows.mean.T, aspect="auto", cmap="viridis", vmin=0, vmax=max(1.0, float(rows.mean.max())))
    axes.set_yticks(range(len(experts)), experts)
    shown = [text.replace("\n", "⏎").replace("$", r"\$") for text in tokens]
    axes.set_xticks(range(len(tokens)), shown, rotation=90, fontsize=8)
    figure.colorbar(image, ax=axes, label="weight, mean over the sites")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise StartupError(f"cannot write {path}: {error.strerror}") from None


def _require_matplotlib(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise StartupError(f"--png {path}: the name must end in .png")
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise StartupError("--png needs matplotlib", hint="pip install 'xlora-service[plot]'") from None
