"""What generate and scalings share: an engine of their own, for the length of one command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console

from service.api.generation.sampling_defaults import SamplingDefaults
from service.api.generation.tokenizer import ModelTokenizer
from service.api.state import engine_options
from service.cli import given_settings
from service.client.engine_client import Client, EngineClient
from service.settings import load_settings


@asynccontextmanager
async def local_engine(arguments: argparse.Namespace) -> AsyncIterator[tuple[Client, ModelTokenizer]]:
    """Loads the bundle in an engine process, with progress on stderr, and ends it afterwards."""
    settings = load_settings(given_settings(arguments))
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    client = EngineClient()
    try:
        with Console(stderr=True).status(f"loading {settings.model}") as status:
            await client.start(engine_options(settings), lambda text: status.update(text))
        yield client, ModelTokenizer(client.info, defaults=SamplingDefaults.of(settings, client.info))
    finally:
        await client.close()


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt, from the flag or from standard input."""
    prompt: str = arguments.prompt
    return sys.stdin.read() if prompt == "-" else prompt
