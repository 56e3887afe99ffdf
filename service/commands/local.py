"""The engine of generate and scalings: one of their own, for the length of one command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from rich.console import Console

from service.api.generation.tokenizer import ModelTokenizer
from service.cli import given_settings
from service.client.engine_client import Client, EngineClient
from service.library.loop_thread import LoopThread
from service.library.session import Session, closed_error
from service.settings import load_settings


@asynccontextmanager
async def local_engine(arguments: argparse.Namespace) -> AsyncIterator[tuple[Client, ModelTokenizer]]:
    """Loads the bundle in an engine process, with progress on stderr, and ends it afterwards."""
    session = _session(arguments)
    try:
        with Console(stderr=True).status(f"loading {session.settings.model}") as status:
            await session.start(lambda text: status.update(text))
        yield session.client, session.tokenizer
    finally:
        await session.close()


@contextmanager
def local_session(arguments: argparse.Namespace) -> Iterator[tuple[LoopThread, Session]]:
    """The same on an event loop of its own, which the caller's thread submits work to."""
    session = _session(arguments)
    loop = LoopThread(closed_error)
    try:
        with Console(stderr=True).status(f"loading {session.settings.model}") as status:
            loop.run(session.start(lambda text: status.update(text)))
        yield loop, session
    finally:
        loop.close(session.close)


def _session(arguments: argparse.Namespace) -> Session:
    settings = load_settings(given_settings(arguments))
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    return Session(settings, EngineClient())


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt, from the flag or from standard input."""
    prompt: str = arguments.prompt
    return sys.stdin.read() if prompt == "-" else prompt
