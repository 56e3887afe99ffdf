"""The API's end of the socket to the engine's process: frames in, typed messages out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec

from service.contract import wire
from service.contract.engine_info import EngineInfo
from service.contract.errors import StartupError
from service.contract.output import StepOutput


class Connection(asyncio.Protocol):
    """Calls back with what has come, once for every message."""

    def __init__(
        self,
        on_step: Callable[[StepOutput], None],
        on_end: Callable[[wire.Failed | None], str],
        on_progress: Callable[[str], None],
        on_identified: Callable[[str], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[EngineInfo] = loop.create_future()
        self.heard_at = loop.time()  # when the engine said anything last
        self.asked_at = self.heard_at  # when a sign of life was asked for last
        self._time = loop.time
        self._on_step = on_step
        self._on_end = on_end
        self._on_progress = on_progress
        self._on_identified = on_identified
        self._transport: asyncio.Transport | None = None
        self._reader = wire.FrameReader()
        self._decoder = msgspec.msgpack.Decoder(wire.FromEngine)
        self._encoder = wire.FrameEncoder()
        self._failure: wire.Failed | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from asyncio's

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._time()
        for frame in self._reader.feed(data):
            self._dispatch(self._decoder.decode(frame))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop: the process has ended, or close() was called."""
        reason = self._on_end(self._failure)
        if not self.ready.done():
            self.ready.set_exception(StartupError(reason, hint=self._failure.hint if self._failure else None))

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
            case wire.Progress(text):
                self._on_progress(text)
            case wire.Ready(info):
                if not self.ready.done():
                    self.ready.set_result(info)
            case wire.Identified(weights_sha256):
                self._on_identified(weights_sha256)
            case wire.Failed():
                self._failure = message
            case wire.Pong():
                pass  # `heard_at` has it
