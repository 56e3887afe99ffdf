"""The API's side of the engine: starts its process, sends requests, hands out what each step brought.

One EngineClient lives on one event loop. It decodes each frame once and wakes exactly the requests the frame has news
for. Leaving `submit`'s block early (a client that went away, an error, a stop string) aborts its requests in the
engine. It also listens to the engine's heart: one that makes no step for a while is stalled, and one that has ended, or
has not answered for too long, is lost for good.
This file knows neither HTTP nor text.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from service.client.connection import Connection
from service.client.output_stream import OutputStream
from service.client.progress import Progress
from service.contract import wire
from service.contract.checks import checked_request
from service.contract.engine_info import EngineInfo
from service.contract.errors import InternalError, TimedOutError, UnavailableError
from service.contract.options import EngineOptions
from service.contract.output import StepOutput, StepStats
from service.contract.request import Request
from service.contract.steering import GateSettings

DEFAULT_LOADER = "service.engine.loader:load_engine"

_SOCKET_BUFFER_BYTES = 4 << 20
_CLOSE_SECONDS = 5.0
_END_SECONDS = 0.5  # between the end of the engine's socket and the end of its process
_HEARTBEATS_PER_TIMEOUT = 4
_MAX_HEARTBEAT_SECONDS = 1.0

logger = logging.getLogger(__name__)


class EngineDiedError(UnavailableError):
    """The engine's process has ended; nothing can be served until the service is restarted."""

    code = "engine_dead"


class Client(Protocol):
    """The interface of an engine that the API needs: EngineClient in production, an in-process fake in tests."""

    on_step: Callable[[StepStats], None] | None
    on_lost: Callable[[str], None] | None  # called once with the reason, when the engine ends before close()

    @property
    def info(self) -> EngineInfo:
        """The model that the engine serves; raises UnavailableError before it is loaded."""

    @property
    def alive(self) -> bool:
        """Whether the engine may still answer: it is loading or running."""

    @property
    def stalled(self) -> bool:
        """Whether the engine has work and makes no step, or does not answer, for longer than a step can take."""

    async def start(self, options: EngineOptions, on_progress: Callable[[str], None]) -> None:
        """Loads the engine; raises StartupError."""

    def submit(self, *requests: Request, deadline: float | None = None) -> AbstractAsyncContextManager[OutputStream]:
        """Queues requests for the length of an `async with` block. Raises InvalidRequestError, as checked_request
        does, before the engine hears of any.
        """

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its choices."""

    def set_gate(self, settings: GateSettings) -> None:
        """The gate of requests submitted from now on; the caller has checked the settings."""

    def log_scalings(self, enabled: bool) -> None:
        """Whether the steps' statistics are to bring what the classifier says."""

    async def close(self) -> None:
        """Ends the engine."""


class EngineClient:
    """The engine's process, seen from the event loop."""

    def __init__(
        self, loader: str = DEFAULT_LOADER, *, timeout_seconds: float = 120.0, stall_seconds: float = 10.0
    ) -> None:
        self.on_step: Callable[[StepStats], None] | None = None
        self.on_lost: Callable[[str], None] | None = None
        self._loader = loader
        self._timeout_seconds = timeout_seconds
        self._progress = Progress(stall_seconds)
        self._said_stalled = False
        self._info: EngineInfo | None = None
        self._weights_sha256: str | None = None  # where the engine said it later
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._streams: dict[str, OutputStream] = {}
        self._dead: str | None = None  # why
        self._closing = False

    @property
    def info(self) -> EngineInfo:
        """The model that the engine serves; raises UnavailableError before it is loaded."""
        if self._info is None:
            raise UnavailableError("the model is still loading", hint="wait until /readyz answers 200")
        return self._info

    @property
    def alive(self) -> bool:
        """Whether the engine may still answer: it is loading or running."""
        return self._dead is None

    @property
    def stalled(self) -> bool:
        """Whether the engine has work and makes no step, or does not answer, for longer than a step can take."""
        connection = self._connection
        if connection is None or self._info is None:
            return False
        waits = connection.asked_at > connection.heard_at
        now = asyncio.get_running_loop().time()
        return self._progress.stalled(now, has_work=self._has_work, asked_at=connection.asked_at if waits else None)

    @property
    def _has_work(self) -> bool:
        """Whether the engine has something to say that it has not said."""
        return any(stream.open_choices for stream in self._streams.values())

    async def start(self, options: EngineOptions, on_progress: Callable[[str], None]) -> None:
        """Starts the process and waits until the model is loaded. Raises StartupError when it cannot be."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "service.engine.worker", str(theirs.fileno()), self._loader]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        await self.connect(ours, options, on_progress)

    async def connect(self, ours: socket.socket, options: EngineOptions, on_progress: Callable[[str], None]) -> None:
        """Speaks with a worker at the other end of a socket, wherever it runs."""
        loop = asyncio.get_running_loop()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            ours.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        connection = Connection(self._on_step, self._on_end, on_progress, self._on_identified)
        await loop.create_connection(lambda: connection, sock=ours)
        self._connection = connection
        connection.send(wire.Start(options))
        info = await connection.ready
        self._info = replace(info, weights_sha256=info.weights_sha256 or self._weights_sha256)
        self._progress.max_step_rows = info.max_num_batched_tokens
        self._heartbeat(connection)

    @asynccontextmanager
    async def submit(self, *requests: Request, deadline: float | None = None) -> AsyncIterator[OutputStream]:
        """Queues requests and yields what the engine says about them. Leaving the block early aborts them.

        Raises InvalidRequestError, as checked_request does, before the engine hears of any, and UnavailableError when
        there is no engine. The stream raises InternalError when the engine goes away after it has been asked, and
        TimedOutError at the deadline (in the time of the event loop).
        """
        if self._dead is not None:
            raise EngineDiedError(f"the engine is gone: {self._dead}")
        connection = self._connection
        if connection is None or self._info is None:
            raise UnavailableError("the model is still loading", hint="wait until /readyz answers 200")
        checked = [checked_request(request, self._info) for request in requests]
        stream = OutputStream(checked)
        if not self._has_work:
            self._progress.mark(asyncio.get_running_loop().time())
        for request in checked:
            self._streams[request.id] = stream
            connection.send(wire.Submit(request))
        timer = None
        if deadline is not None:
            timer = asyncio.get_running_loop().call_at(
                deadline, stream.fail, TimedOutError("the request has reached its timeout")
            )
        try:
            yield stream
        finally:
            if timer is not None:
                timer.cancel()
            unfinished = {request_id for request_id, _ in stream.open_choices}
            for request in requests:
                del self._streams[request.id]
                if request.id in unfinished:
                    self.abort(request.id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its choices. Its stream says nothing more about it."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.drop(request_id, index)
        self._send(wire.Abort(request_id, index))

    def set_gate(self, settings: GateSettings) -> None:
        """The gate of requests submitted from now on; the caller has checked the settings."""
        self._send(wire.SetGate(settings))

    def log_scalings(self, enabled: bool) -> None:
        """Whether the steps' statistics are to bring what the classifier says."""
        self._send(wire.LogScalings(enabled))

    def _send(self, message: wire.ToEngine) -> None:
        if self._connection is not None:
            self._connection.send(message)

    async def close(self) -> None:
        """Ends the process: it leaves when its socket closes, and is killed when it does not."""
        self._closing = True
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            if self._info is None:
                self._process.kill()  # it is loading, and would not look at its socket for a while
            await asyncio.to_thread(_end, self._process)

    def _heartbeat(self, connection: Connection) -> None:
        """Asks the engine for a sign of life, again and again; gives it up when none has come for too long."""
        if self._dead is not None:
            return
        loop = asyncio.get_running_loop()
        if connection.asked_at <= connection.heard_at:
            connection.asked_at = loop.time()
            connection.send(wire.Ping())
        elif loop.time() - connection.asked_at > self._timeout_seconds:
            self._lose(f"the engine has not answered for {self._timeout_seconds:g} s (--engine-timeout)")
            if self._process is not None:
                self._process.kill()
            connection.close()
            return
        self._say_stalled()
        loop.call_later(
            min(_MAX_HEARTBEAT_SECONDS, self._timeout_seconds / _HEARTBEATS_PER_TIMEOUT), self._heartbeat, connection
        )

    def _say_stalled(self) -> None:
        """Tells the log when the engine stalls, and when it goes on."""
        if self.stalled and not self._said_stalled:
            logger.warning(
                "the engine has made no step for %.1f s: /readyz answers 503 until it does",
                self._progress.limit_seconds,
            )
        elif self._said_stalled and not self.stalled:
            logger.warning("the engine makes steps again: /readyz answers 200")
        self._said_stalled = self.stalled

    def _on_step(self, output: StepOutput) -> None:
        self._progress.stepped(asyncio.get_running_loop().time(), output.stats)
        for one in output.outputs:
            stream = self._streams.get(one.request_id)
            if stream is not None:
                stream.deliver(one)
        if self.on_step is not None:
            self.on_step(output.stats)

    def _on_identified(self, weights_sha256: str) -> None:
        self._weights_sha256 = weights_sha256
        if self._info is not None:
            self._info = replace(self._info, weights_sha256=weights_sha256)

    def _on_end(self, failure: wire.Failed | None) -> str:
        """The socket has closed: says why, to whoever waits for the engine."""
        reason = _describe_end(self._process) if failure is None else failure.message
        if self._dead is None:
            self._lose(reason)
        return reason

    def _lose(self, reason: str) -> None:
        self._dead = reason
        gone = InternalError(f"the engine is gone: {reason}", code="engine_dead")
        if self._closing:
            gone = InternalError("the server stopped", code="stopping", hint="send the request again")
        elif self._info is not None:  # before that, whoever waits in `start` is told, and nobody else
            logger.error("%s", reason)
        for stream in set(self._streams.values()):
            stream.fail(gone)
            stream.open_choices.clear()
        if self.on_lost is not None and not self._closing:
            self.on_lost(reason)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _describe_end(process: subprocess.Popen[bytes] | None) -> str:
    """Why a process that said nothing has ended."""
    try:
        code = None if process is None else process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        code = None
    if code is None or code >= 0:
        return "the engine's process ended unexpectedly"
    memory = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f"the engine's process was ended by {signal.Signals(-code).name}{memory}"
