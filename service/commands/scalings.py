"""xlora-serve scalings: the gate's weights over a text, as a table of tokens and experts, and as a heat map; or over a
file of texts, as arrays or as JSON Lines.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from rich.console import Console
from rich.table import Table

from service.api.gate_views.rows import RowFormat, Rows
from service.api.generation.scaling_pass import scaling_rows
from service.api.state import new_id
from service.commands import heat_map
from service.commands.batch import npz
from service.commands.batch.batch import check_flags, run_batch
from service.commands.batch.formats import ScalingsFormat
from service.commands.batch.input_file import OPENAI_KEY, InputFile
from service.commands.local import local_engine, read_prompt
from service.contract.errors import StartupError
from service.contract.request import Request
from service.terminal import scalings_table


def run(arguments: argparse.Namespace) -> int:
    """Draws the table, and saves the heat map when asked for; or reads a file, with exit code 1 where a text fails."""
    check_flags(arguments, with_prompt=("png",), with_file=("scalings",))
    if arguments.prompts is not None:
        return _run_file(arguments)
    if arguments.png is not None:
        _check_png(Path(arguments.png))
    tokens, experts, rows = asyncio.run(_run(arguments))
    _print_table(scalings_table(tokens, experts, rows.mean, rows.entropy))
    if arguments.png is not None:
        save_heat_map(Path(arguments.png), tokens, experts, rows)
    return 0


def _print_table(table: Table) -> None:
    """As wide as the terminal; in a pipe or a file, whose width nobody knows, nothing is cut."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table).maximum)
    console.print(table)


def _run_file(arguments: argparse.Namespace) -> int:
    prompts, path = InputFile(Path(arguments.prompts)), Path(arguments.output)
    if prompts.is_openai:
        raise StartupError(
            f"{prompts.path} has requests in OpenAI's batch format ({OPENAI_KEY!r}), none of which is for scalings"
        )
    is_npz = path.suffix == ".npz"
    format = ScalingsFormat({"return_scalings": arguments.scalings or "mean"}, arrays_only=is_npz)
    if not is_npz:
        return min(1, run_batch(arguments, prompts, path, format))
    failed = run_batch(arguments, prompts, npz.part_of(path), format, npz.ids_in(path))
    npz.finish(path, keep_part=failed > 0)
    return min(1, failed)


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
        raise StartupError(f"--png {path}: the file's name must end in .png")
    heat_map.check_matplotlib()
