"""xlora-serve serve: the HTTP server, from a bound socket to a clean end."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket

import uvicorn
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
)

from service.api.app import create_app
from service.cli import given_settings
from service.engine.client import EngineClient
from service.errors import StartupError
from service.metrics import Metrics
from service.settings import Settings, load_settings

_BACKLOG = 2048
_GRACE_SECONDS = 8  # less than the ten seconds a container is given


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal. Raises StartupError when the model cannot be loaded or the port is taken."""
    settings = load_settings(given_settings(arguments))
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with bind(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        logging.getLogger("xlora").info("listening on http://%s:%s, docs at /docs", host, port)
        error = uvloop_run(settings, listener)
    if error is not None:
        raise error
    return 0


def uvloop_run(settings: Settings, listener: socket.socket) -> StartupError | None:
    """Runs the event loop to its end; returns why the model could not be loaded, if so."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after it has shut down
    with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto").get_loop_factory()) as runner:
        return runner.run(serve(settings, listener))


async def serve(settings: Settings, listener: socket.socket) -> StartupError | None:
    """One server on one socket."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    failed = asyncio.Event()
    app = create_app(EngineClient(), settings, Metrics(registry), failed)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        http="httptools",
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    server = uvicorn.Server(config)
    watcher = asyncio.create_task(_stop_when(failed, server))
    try:
        await server.serve([listener])
    finally:
        watcher.cancel()
    error: StartupError | None = app.state.service.startup_error
    return error


def bind(host: str, port: int) -> socket.socket:
    """The listening socket. Raises StartupError when the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StartupError(
            f"cannot listen on {host}:{port}: {reason}", hint="choose another --host or --port"
        ) from None


async def _stop_when(failed: asyncio.Event, server: uvicorn.Server) -> None:
    await failed.wait()
    server.should_exit = True
