"""xlora-serve serve: the HTTP server, from a bound socket to a clean end.

The first SIGTERM or Ctrl-C drains: /readyz answers 503, after --drain-delay new requests are refused, running ones may
end within --drain-seconds. A second one cuts off what runs: each call gets an error that says so.
Exit codes: 0 stopped by SIGTERM, 1 could not start, 3 the engine was lost, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import logging
import math
import signal
import socket
import ssl
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
)
from uvicorn.config import create_ssl_context

from service.api import logs
from service.api.app import create_app
from service.api.connections.acceptor import Acceptor
from service.api.connections.bounds import ConnectionLimits, HttpProtocol
from service.api.connections.open_connections import OpenConnections
from service.api.middleware.keys import reload as reload_keys
from service.api.middleware.tracing import SpanExport
from service.api.state import Service
from service.cli import given_settings
from service.client.engine_client import EngineClient
from service.commands.listener import bind
from service.contract.errors import EngineLostError, SettingsError, StartupError
from service.observability.metrics import Metrics
from service.settings import Settings, load_settings

_LAST_ANSWERS_SECONDS = 3  # for answers that are complete and not yet read
_LAST_TASKS_SECONDS = 2  # for what has lost its connection then
_RED_SECONDS = 1.0  # a lost engine is seen by probes before the process ends
_POLL_SECONDS = 0.05

logger = logging.getLogger("xlora")


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal. Raises StartupError when the service cannot start, EngineLostError when it must end."""
    settings = load_settings(given_settings(arguments))
    logs.configure(settings.log_level, settings.log_format)
    with bind(settings.host, settings.port) as listener:
        error = uvloop_run(settings, listener)
    if error is not None:
        raise error
    return 0


def uvloop_run(settings: Settings, listener: socket.socket) -> StartupError | EngineLostError | None:
    """Runs the event loop to its end; returns why the process must end, if not because of a signal."""
    with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()) as runner:
        return runner.run(serve(settings, listener))


async def serve(settings: Settings, listener: socket.socket) -> StartupError | EngineLostError | None:
    """One server on one socket."""
    failed = asyncio.Event()
    app, spans = assemble(settings, failed)
    gc.freeze()  # what is there now stays: a garbage collection that walks over it stops the loop for 100 ms
    service: Service = app.state.service
    connections = OpenConnections()
    server = Server(configuration(app, settings, connections), service, connections)
    watchers = [asyncio.create_task(_stop_when(failed, server, service)), asyncio.create_task(_drain(server, service))]
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after it has shut down
    if settings.ssl_certfile is not None or any(keys.file is not None for keys in service.keys):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.reload)
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.ssl_certfile is None else "https"
    logger.info("listening on %s://%s:%s, docs at /docs", scheme, host, port)
    try:
        await server.serve([listener])
    finally:
        for watcher in watchers:
            watcher.cancel()
        for span in spans:
            await asyncio.to_thread(span.close)
    return service.error


def assemble(settings: Settings, failed: asyncio.Event | None = None) -> tuple[FastAPI, list[SpanExport]]:
    """The application with an engine process of its own, and what to close after it."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    client = EngineClient(timeout_seconds=settings.engine_timeout, stall_seconds=settings.stall_seconds)
    spans = [] if settings.otlp_endpoint is None else [SpanExport.to(settings.otlp_endpoint)]
    return create_app(client, settings, Metrics(registry), failed, spans), spans


def configuration(app: Any, settings: Settings, connections: OpenConnections) -> uvicorn.Config:
    """uvicorn's settings; the connections will add themselves. Raises SettingsError for TLS files that do not work."""
    limits = ConnectionLimits(settings.max_header_bytes, settings.keep_alive, settings.write_timeout)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",  # its warnings are of what clients send, and are answered
        access_log=False,
        http=functools.partial(HttpProtocol, limits=limits, connections=connections),  # type: ignore[arg-type]
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS + _LAST_TASKS_SECONDS,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    )
    if settings.ssl_certfile is None and (settings.ssl_keyfile or settings.ssl_ca_certs):
        raise SettingsError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"--ssl-certfile {settings.ssl_certfile}: {error}") from None
    logging.getLogger("uvicorn.error").addFilter(logs.is_news)
    return config


class Server(uvicorn.Server):
    """uvicorn's server, which a signal tells to drain first."""

    def __init__(self, config: uvicorn.Config, service: Service, connections: OpenConnections) -> None:
        super().__init__(config)
        self.hurried = False  # told a second time: nothing is waited for
        self._service = service
        self._connections = connections
        self._signal = signal.SIGTERM
        self._acceptors: list[Acceptor] = []

    def reload(self) -> None:
        """Takes keys and TLS files as they are now. Where one of them is wrong, all stay as they were."""
        try:
            context = _tls(self.config)
            found = reload_keys(self._service.keys)
        except SettingsError as error:
            logger.error("keys and certificates stay as they were: %s", error)
            return
        for acceptor in self._acceptors:
            acceptor.context = context
        logger.info("reloaded keys (%s)%s", found or "none", "" if context is None else f", {self.config.ssl_certfile}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the interpreter between any two instructions: it only leaves notes, unless it is the third."""
        if self.hurried:
            super().handle_exit(sig, frame)
        self.hurried = self._service.draining
        self._signal = signal.Signals(sig)
        self._service.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn, to which our acceptors are its servers."""
        await super().startup([])
        given = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        protocols = functools.partial(self.config.http_protocol_class, **given)
        self._acceptors = [Acceptor(one, protocols, self.config.ssl, self._connections) for one in sockets or ()]
        self.servers += self._acceptors  # type: ignore[arg-type]

    def stop(self) -> None:
        """Ends the server as the signal wanted."""
        super().handle_exit(self._signal, None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for answers to be read, then closes their connections: uvicorn would cancel what writes them."""
        closing = asyncio.get_running_loop().call_later(_LAST_ANSWERS_SECONDS, self._abort_connections)
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _tls(config: uvicorn.Config) -> ssl.SSLContext | None:
    """A context of the TLS files as they are now, made as uvicorn makes it at the start. Raises SettingsError."""
    if config.ssl_certfile is None:
        return None
    try:
        return create_ssl_context(
            config.ssl_certfile,
            config.ssl_keyfile,
            config.ssl_keyfile_password,
            config.ssl_version,
            config.ssl_cert_reqs,
            config.ssl_ca_certs,
            config.ssl_ciphers,
        )
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"--ssl-certfile {config.ssl_certfile}: {error}") from None


async def _drain(server: Server, service: Service) -> None:
    """Waits for a signal's note, for load balancers, and for what runs; cuts off what takes too long."""
    await _until(lambda: service.draining)
    await _until(lambda: server.hurried, service.settings.drain_delay)
    service.refusing = True
    await _until(lambda: server.hurried or not service.admission.running, service.settings.drain_seconds)
    if service.admission.running:
        reason = "a second signal came" if server.hurried else "--drain-seconds have passed"
        logger.warning("%d unfinished requests are ended: %s", service.admission.running, reason)
        await service.client.close()
    server.stop()


async def _until(condition: Callable[[], bool], seconds: float = math.inf) -> None:
    """Returns when the condition holds, or at the latest after some time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)


async def _stop_when(failed: asyncio.Event, server: uvicorn.Server, service: Service) -> None:
    await failed.wait()
    if isinstance(service.error, EngineLostError):
        await asyncio.sleep(_RED_SECONDS)
    server.should_exit = True
