"""xlora-serve generate: text as it comes, and with --scalings in the colours of the experts that wrote it."""

from __future__ import annotations

import argparse
import asyncio

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from service.api.errors import explain
from service.api.gate_views.rows import RowFormat
from service.api.generation.choice import Delta, Generation
from service.api.schemas.bodies import GenerateBody
from service.api.state import new_id
from service.commands.local import local_engine, read_prompt
from service.contract.request import Request, ReturnScalings
from service.terminal import expert_styles, legend

_SAMPLING = ("max_tokens", "top_k", "seed", "temperature", "top_p", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def run(arguments: argparse.Namespace) -> int:
    """Streams one generation to the terminal."""
    asyncio.run(_run(arguments, read_body(arguments)))
    return 0


def read_body(arguments: argparse.Namespace) -> GenerateBody:
    """The flags as the body of POST /generate, checked the same way."""
    fields = {name: getattr(arguments, name) for name in (*_SAMPLING, *_PENALTIES, "stop", "ignore_eos")}
    try:
        return GenerateBody(prompt=read_prompt(arguments), **fields)
    except ValidationError as error:
        raise explain(error.errors(), "/generate") from None


async def _run(arguments: argparse.Namespace, body: GenerateBody) -> None:
    async with local_engine(arguments) as (client, tokenizer):
        ids = await tokenizer.prompt_ids(body.prompt)
        scalings: ReturnScalings = "mean" if arguments.scalings else "none"
        request = Request(new_id("cli"), ids, tokenizer.sampling(body, len(ids)), scalings)
        generation = Generation(client, tokenizer, [request], body.stop or [], RowFormat(client.info))
        console = Console(highlight=False, soft_wrap=True)
        styles = expert_styles(len(client.info.experts))
        async for deltas in generation.deltas():
            for delta in deltas:
                console.print(Text(delta.text, style=_style(delta, styles)), end="")
        console.print()
        if arguments.scalings:
            console.print(legend([expert["name"] for expert in client.info.experts], styles))


def _style(delta: Delta, styles: list[str]) -> str:
    if delta.rows is None or not len(delta.rows.mean):
        return ""
    return styles[int(delta.rows.mean[-1].argmax())]
