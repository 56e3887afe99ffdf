"""xlora-serve scalings: the gate's weights over a text, as a table of tokens and experts, and as a heat map."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from rich.console import Console

from service.api.gate_views.rows import RowFormat, Rows
from service.api.generation.scaling_pass import scaling_rows
from service.api.state import new_id
from service.commands import heat_map
from service.commands.local import local_engine, read_prompt
from service.contract.errors import StartupError
from service.contract.request import Request
from service.terminal import scalings_table


def run(arguments: argparse.Namespace) -> int:
    """Draws the table; saves the heat map when asked for."""
    if arguments.png is not None:
        _check_png(Path(arguments.png))
    tokens, experts, rows = asyncio.run(_run(arguments))
    Console(highlight=False).print(scalings_table(tokens, experts, rows.mean, rows.entropy))
    if arguments.png is not None:
        save_heat_map(Path(arguments.png), tokens, experts, rows)
    return 0


async def _run(arguments: argparse.Namespace) -> tuple[list[str], list[str], Rows]:
    async with local_engine(arguments) as (client, tokenizer):
        ids = await tokenizer.prompt_ids(read_prompt(arguments))
        request = Request(new_id("cli"), ids, None, "mean", 0)
        ((rows, _),) = await scaling_rows(client, [request], RowFormat(client.info))
        return tokenizer.texts(ids), [expert["name"] for expert in client.info.experts], rows


def save_heat_map(path: Path, tokens: list[str], experts: list[str], rows: Rows) -> None:
    """A PNG with a row per token and a column per expert."""
    heat_map.check_size(len(tokens), len(experts))
    labels = heat_map.token_labels(tokens)
    try:
        path.write_bytes(heat_map.png("weight, mean over the sites", labels, experts, rows.mean))
    except OSError as error:
        raise StartupError(f"cannot write {path}: {error.strerror}") from None


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise StartupError(f"--png {path}: the name must end in .png")
    heat_map.check_matplotlib()
