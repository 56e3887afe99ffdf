"""xlora-serve generate: text as it comes, and with --scalings in the colours of the experts that wrote it; or a file of
prompts to a file of answers.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

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
from service.terminal import expert_styles, legend

_SAMPLING = ("max_tokens", "top_k", "seed", "temperature", "top_p", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def run(arguments: argparse.Namespace) -> int:
    """Streams one generation to the terminal, or answers a file; exit code 1 where one of its prompts fails."""
    check_flags(arguments)
    if arguments.prompts is None and arguments.scalings == "full":
        raise SettingsError("--scalings full with --prompt", hint="the colours are of the mean: leave `full` out")
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
            f"sampling flags with {prompts.path}, whose lines are requests of OpenAI's",
            hint="leave the flags out: each line's body says how it is sampled, and its `xlora` what scalings it wants",
        )
    return OpenAIFormat()


async def _run(arguments: argparse.Namespace, body: GenerateBody) -> None:
    async with local_engine(arguments) as (client, tokenizer):
        ids = await tokenizer.prompt_ids(body.prompt)
        scalings: ReturnScalings = "none" if arguments.scalings is None else "mean"
        request = Request(new_id("cli"), ids, tokenizer.sampling(body, len(ids)), scalings)
        generation = Generation(client, tokenizer, [request], body.stop or [], RowFormat(client.info))
        console = Console(highlight=False, soft_wrap=True)
        styles = expert_styles(len(client.info.experts))
        async for deltas in generation.deltas():
            for delta in deltas:
                console.print(Text(delta.text, style=_style(delta, styles)), end="")
        console.print()
        if arguments.scalings is not None:
            console.print(legend([expert["name"] for expert in client.info.experts], styles))


def _style(delta: Delta, styles: list[str]) -> str:
    if delta.rows is None or not len(delta.rows.mean):
        return ""
    return styles[int(delta.rows.mean[-1].argmax())]
