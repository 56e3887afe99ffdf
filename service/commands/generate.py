"""xlora-serve generate: text as it comes, and with --scalings in the colours of the experts that wrote it, or with a
table of their weights where there are no colours; or a file of prompts to a file of answers.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from service.api.errors import explain
from service.api.gate_views.rows import RowFormat
from service.api.generation.choice import Delta, Generation
from service.api.schemas.bodies import GenerateBody
from service.api.state import new_id
from service.commands.batch.batch import check_flags, run_batch
from service.commands.batch.formats import Format, GenerateFormat, OpenAIFormat
from service.commands.batch.input_file import InputFile
from service.commands.local import local_engine, read_prompt
from service.contract.errors import SettingsError
from service.contract.request import Request, ReturnScalings
from service.terminal import expert_styles, leader, legend, spans_table

_SAMPLING = ("max_tokens", "top_k", "seed", "temperature", "top_p", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def run(arguments: argparse.Namespace) -> int:
    """Streams one generation to the terminal, or answers a file; exit code 1 where one of its prompts fails."""
    check_flags(arguments)
    if arguments.prompts is None and arguments.scalings == "full":
        raise SettingsError(
            "--scalings full needs --prompts", hint="the terminal shows the mean over the sites: leave `full` out"
        )
    if arguments.prompts is not None:
        prompts = InputFile(Path(arguments.prompts))
        return min(1, run_batch(arguments, prompts, Path(arguments.output), _format(arguments, prompts)))
    asyncio.run(_run(arguments, read_body(arguments)))
    return 0


def read_body(arguments: argparse.Namespace) -> GenerateBody:
    """The flags as the body of POST /generate, checked the same way."""
    try:
        return GenerateBody(prompt=read_prompt(arguments), **_sampling(arguments))
    except ValidationError as error:
        raise explain(error.errors(), "/generate") from None


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, by the fields of POST /generate."""
    found = {name: getattr(arguments, name) for name in (*_SAMPLING, *_PENALTIES, "stop", "ignore_eos")}
    return {name: value for name, value in found.items() if value is not None}


def _format(arguments: argparse.Namespace, prompts: InputFile) -> Format:
    """The format of a file. Raises SettingsError for flags that one of OpenAI's cannot follow."""
    common = _sampling(arguments)
    if arguments.scalings is not None:
        common["return_scalings"] = arguments.scalings
    if not prompts.is_openai:
        return GenerateFormat(common)
    if common:
        raise SettingsError(
            f"{prompts.path} has requests in OpenAI's batch format, to which sampling flags do not apply",
            hint="leave the flags out, and set the fields in each line's `body`; its `xlora` takes return_scalings",
        )
    return OpenAIFormat()


async def _run(arguments: argparse.Namespace, body: GenerateBody) -> None:
    async with local_engine(arguments) as (client, tokenizer):
        ids = await tokenizer.prompt_ids(body.prompt)
        scalings: ReturnScalings = "none" if arguments.scalings is None else "mean"
        request = Request(new_id("cli"), ids, tokenizer.sampling(body, len(ids)), scalings)
        generation = Generation(client, tokenizer, [request], body.stop or [], RowFormat(client.info))
        names = [expert["name"] for expert in client.info.experts]
        if arguments.scalings is None:
            await _print_text(generation)
        else:
            await _print_scalings(generation, names)


async def _print_text(generation: Generation) -> None:
    console = Console(highlight=False, soft_wrap=True)
    async for deltas in generation.deltas():
        console.print(Text("".join(delta.text for delta in deltas)), end="")
    console.print()


async def _print_scalings(generation: Generation, experts: list[str]) -> None:
    """The text in colours and their legend; in a pipe, a file or under NO_COLOR the text and a table of weights."""
    console = Console(highlight=False, soft_wrap=True)
    styles = expert_styles(len(experts))
    tokens: list[str] = []
    rows: list[npt.NDArray[np.float32]] = []
    async for deltas in generation.deltas():
        for delta in deltas:
            row = _last_row(delta)
            first = None if row is None else leader(row)
            console.print(Text(delta.text, style="" if first is None else styles[first]), end="")
            if row is not None:
                tokens.append(delta.token_text)
                rows.append(row)
    console.print()
    if console.color_system is not None and not console.no_color:
        console.print(legend(experts, styles))
    elif rows:
        console.print("", *map(Text, spans_table(tokens, experts, np.stack(rows))), sep="\n")


def _last_row(delta: Delta) -> npt.NDArray[np.float32] | None:
    """The weights [E] of the position that produced the token."""
    return None if delta.rows is None or not len(delta.rows.mean) else delta.rows.mean[-1]
