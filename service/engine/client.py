"""The API's side of the engine: starts its process, sends requests, hands out what each step brought.

One EngineClient lives on one event loop. It decodes each frame once and wakes exactly the requests the frame has news
for. Leaving `submit`'s block early (a client that went away, an error, a stop string) aborts the request in the engine.
This file knows neither HTTP nor text.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, cast

import msgspec

from service.engine import wire
from service.engine.options import EngineOptions
from service.engine.request import EngineInfo, Request, SequenceOutput, StepOutput, StepStats
from service.errors import StartupError, UnavailableError, XLoraError

DEFAULT_LOADER = "service.engine.loader:load_engine"

_SOCKET_BUFFER_BYTES = 4 << 20
_CLOSE_SECONDS = 5.0

logger = logging.getLogger(__name__)


class EngineDiedError(UnavailableError):
    """The engine's process has ended; nothing can be served until the service is restarted."""

    code = "engine_dead"


class OutputStream(AsyncIterator[SequenceOutput]):
    """What the engine says about one request, as it says it; ends after the last choice has ended."""

    def __init__(self, request: Request) -> None:
        self.open_choices = set(range(1 if request.sampling is None else request.sampling.n))
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue: asyncio.Queue[SequenceOutput | XLoraError] = asyncio.Queue()
        self._pending = set(self.open_choices)  # choices whose end the reader has not seen

    def deliver(self, output: SequenceOutput) -> None:
        """One more output, unless its choice was aborted meanwhile."""
        if output.index not in self.open_choices:
            return
        if output.finish_reason is not None:
            self.open_choices.discard(output.index)
        self._queue.put_nowait(output)

    def fail(self, error: XLoraError) -> None:
        """Nothing more will come, and this is why."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._queue.put_nowait(error)

    def drop(self, index: int) -> None:
        """The reader wants no more of this choice."""
        self.open_choices.discard(index)
        self._pending.discard(index)

    async def __anext__(self) -> SequenceOutput:
        while self._pending:
            item = await self._queue.get()
            if isinstance(item, XLoraError):
                raise item
            if item.index not in self._pending:
                continue
            if item.finish_reason is not None:
                self._pending.discard(item.index)
            return item
        raise StopAsyncIteration


class Client(Protocol):
    """What the API needs of an engine: EngineClient in production, an in-process fake in tests."""

    on_step: Callable[[StepStats], None] | None

    @property
    def info(self) -> EngineInfo:
        """What the engine serves; raises UnavailableError before it is loaded."""

    @property
    def alive(self) -> bool:
        """Whether the engine may still answer: it is loading or running."""

    async def start(self, options: EngineOptions, on_progress: Callable[[str], None]) -> None:
        """Loads the engine; raises StartupError."""

    def submit(self, request: Request) -> AbstractAsyncContextManager[AsyncIterator[SequenceOutput]]:
        """Queues a request for the length of an `async with` block; raises the RequestError that refuses it."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its choices."""

    async def close(self) -> None:
        """Ends the engine."""


class EngineClient:
    """The engine's process, seen from the event loop."""

    def __init__(self, loader: str = DEFAULT_LOADER) -> None:
        self.on_step: Callable[[StepStats], None] | None = None
        self._loader = loader
        self._info: EngineInfo | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: _Connection | None = None
        self._streams: dict[str, OutputStream] = {}
        self._dead: str | None = None  # why
        self._closing = False

    @property
    def info(self) -> EngineInfo:
        """What the engine serves; raises UnavailableError before it is loaded."""
        if self._info is None:
            raise UnavailableError("the model is still loading", hint="wait until /readyz answers 200")
        return self._info

    @property
    def alive(self) -> bool:
        """Whether the engine may still answer: it is loading or running."""
        return self._dead is None

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
        connection = _Connection(self._on_step, self._on_verdict, self._on_lost, on_progress)
        await loop.create_connection(lambda: connection, sock=ours)
        self._connection = connection
        connection.send(wire.Start(options))
        self._info = await connection.ready

    @asynccontextmanager
    async def submit(self, request: Request) -> AsyncIterator[OutputStream]:
        """Queues a request and yields its outputs. Leaving the block early aborts the request.

        Raises the RequestError with which the engine refuses it, and UnavailableError when the engine is or goes away.
        """
        if self._dead is not None:
            raise EngineDiedError(f"the engine is gone: {self._dead}")
        connection = self._connection
        if connection is None or self._info is None:
            raise UnavailableError("the model is still loading", hint="wait until /readyz answers 200")
        stream = self._streams[request.id] = OutputStream(request)
        connection.send(wire.Submit(request))
        try:
            await stream.accepted
            yield stream
        finally:
            del self._streams[request.id]
            if stream.open_choices:
                self.abort(request.id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its choices. Its stream says nothing more about it."""
        stream = self._streams.get(request_id)
        if stream is not None:
            for choice in list(stream.open_choices) if index is None else [index]:
                stream.drop(choice)
        if self._connection is not None:
            self._connection.send(wire.Abort(request_id, index))

    async def close(self) -> None:
        """Ends the process: it leaves when its socket closes, and is killed when it does not."""
        self._closing = True
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            if self._info is None:
                self._process.terminate()  # it is loading, and would not look at its socket for a while
            await asyncio.to_thread(_end, self._process)

    def _on_step(self, output: StepOutput) -> None:
        for one in output.outputs:
            stream = self._streams.get(one.request_id)
            if stream is not None:
                stream.deliver(one)
        if self.on_step is not None:
            self.on_step(output.stats)

    def _on_verdict(self, verdict: wire.Accepted | wire.Rejected) -> None:
        stream = self._streams.get(verdict.request_id)
        if stream is None or stream.accepted.done():
            return
        if isinstance(verdict, wire.Rejected):
            stream.open_choices.clear()  # there is nothing to abort
            stream.fail(verdict.to_error())
        else:
            stream.accepted.set_result(None)

    def _on_lost(self, reason: str) -> None:
        self._dead = reason
        if not self._closing:
            logger.error("%s", reason)
        for stream in self._streams.values():
            stream.open_choices.clear()
            stream.fail(EngineDiedError(f"the engine is gone: {reason}"))


class _Connection(asyncio.Protocol):
    """The socket: frames in, typed messages out."""

    def __init__(
        self,
        on_step: Callable[[StepOutput], None],
        on_verdict: Callable[[wire.Accepted | wire.Rejected], None],
        on_lost: Callable[[str], None],
        on_progress: Callable[[str], None],
    ) -> None:
        self.ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._on_step = on_step
        self._on_verdict = on_verdict
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._transport: asyncio.Transport | None = None
        self._reader = wire.FrameReader()
        self._decoder = msgspec.msgpack.Decoder(wire.FromEngine)
        self._encoder = wire.FrameEncoder()
        self._failure: wire.Failed | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from asyncio's

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        for frame in self._reader.feed(data):
            self._dispatch(self._decoder.decode(frame))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop: the process has ended, or close() was called."""
        failure = self._failure or wire.Failed("the engine's process ended unexpectedly")
        if not self.ready.done():
            self.ready.set_exception(StartupError(failure.message, hint=failure.hint))
        self._on_lost(failure.message)

    def send(self, message: wire.ToEngine) -> None:
        """Queues one message; nothing happens when the other side has gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._encoder.encode(message))

    def close(self) -> None:
        """Closes the socket, upon which the process ends."""
        if self._transport is not None:
            self._transport.close()

    def _dispatch(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Step(output):
                self._on_step(output)
            case wire.Accepted() | wire.Rejected():
                self._on_verdict(message)
            case wire.Progress(text):
                self._on_progress(text)
            case wire.Ready(info):
                if not self.ready.done():
                    self.ready.set_result(info)
            case wire.Failed():
                self._failure = message


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
