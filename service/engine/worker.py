"""The engine's process: reads messages from a socket, steps the engine, and sends each step's outputs.

    python -m service.engine.worker FD MODULE:FUNCTION

FD is one end of a socket pair whose other end the parent holds (client/). MODULE:FUNCTION is the function that loads
the engine. It is imported after the first progress message, because importing torch takes seconds. When the parent
dies, the socket closes, and this process ends. It ignores Ctrl-C and SIGTERM, which terminals and supervisors send to
whole process groups: the parent drains, then closes the socket.

This file knows messages and the EngineSurface, and neither torch nor asyncio.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, Protocol

import msgspec

from service.contract import wire
from service.contract.engine_info import EngineInfo
from service.contract.errors import XLoraError
from service.contract.options import EngineOptions
from service.contract.output import Failure, SequenceOutput, StepOutput
from service.contract.request import Request
from service.contract.steering import GateSettings

_RECV_BYTES = 1 << 20
_SOCKET_BUFFER_BYTES = 4 << 20

logger = logging.getLogger(__name__)


class EngineSurface(Protocol):
    """The methods of an engine (engine.py) that the worker calls."""

    info: EngineInfo

    def add(self, request: Request) -> None:
        """Queues a request that has passed checked_request. An exception ends this request alone."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its choices, and releases its blocks."""

    def set_gate(self, settings: GateSettings) -> None:
        """Sets the gate of requests that are added from now on."""

    def log_scalings(self, enabled: bool) -> None:
        """Switches on or off that steps report the classifier's weights."""

    def has_work(self) -> bool:
        """Whether step() has anything to do."""

    def wait(self) -> None:
        """Waits until the device has finished the step in flight, if any."""

    def step(self) -> StepOutput:
        """One forward pass."""

    def report(self) -> StepOutput:
        """Statistics without a step."""

    def hash_weights(self, on_known: Callable[[str], None]) -> None:
        """Calls `on_known` with the hash over all weight files, later and from another thread."""


# Called with options, a callback for progress, and a callback (in another thread) for a lost part of the engine.
LoadEngine = Callable[[EngineOptions, Callable[[str], None], Callable[[str], None]], EngineSurface]


class Disconnected(Exception):
    """The parent has closed its end."""


class Worker:
    """One engine on one socket."""

    def __init__(self, connection: socket.socket, load: LoadEngine) -> None:
        self._socket = connection
        self._load = load
        self._reader = wire.FrameReader()
        self._decoder = msgspec.msgpack.Decoder(wire.ToEngine)
        self._encoder = wire.FrameEncoder()
        self._sending = threading.Lock()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)

    def run(self) -> int:
        """Serves until the parent closes the socket (exit code 0) or the engine fails (1)."""
        try:
            return self._serve()
        except (Disconnected, ConnectionError):
            return 0

    def _serve(self) -> int:
        try:
            engine = self._start()
        except XLoraError as error:
            return self._fail(error.message, error.hint)
        except Exception as error:
            logger.exception("loading failed")
            return self._fail(f"loading failed: {type(error).__name__}: {error}")
        gc.collect()
        gc.freeze()  # the model's objects live as long as the process, so collections need not traverse them
        self._send(wire.Ready(engine.info))
        if engine.info.weights_sha256 is None:
            engine.hash_weights(self._identified)
        try:
            self._loop(engine)
        except (Disconnected, ConnectionError):
            raise
        except XLoraError as error:
            return self._fail(error.message, error.hint)
        except Exception as error:
            logger.exception("the engine failed")
            return self._fail(f"the engine failed: {type(error).__name__}: {error}")

    def _start(self) -> EngineSurface:
        messages = self._receive(wait=True)
        if not isinstance(messages[0], wire.Start):
            raise TypeError(f"the first message must be Start, not {type(messages[0]).__name__}")
        return self._load(messages[0].options, lambda text: self._send(wire.Progress(text)), self._lose)

    def _loop(self, engine: EngineSurface) -> NoReturn:
        while True:
            engine.wait()  # messages that arrive meanwhile are applied before the next launch
            messages = self._receive(wait=not engine.has_work())
            failed = [output for message in messages for output in self._apply(engine, message)]
            if engine.has_work():
                output = engine.step()
            elif any(not isinstance(message, wire.Ping) for message in messages):
                output = engine.report()
            else:
                continue
            output.outputs[:0] = failed
            self._send(wire.Step(output))

    def _apply(self, engine: EngineSurface, message: wire.ToEngine) -> list[SequenceOutput]:
        """Applies a message. Returns the outputs of choices that it ended."""
        match message:
            case wire.Abort(request_id, index):
                engine.abort(request_id, index)
            case wire.Submit(request):
                return self._submit(engine, request)
            case wire.SetGate(settings):
                engine.set_gate(settings)
            case wire.LogScalings(enabled):
                engine.log_scalings(enabled)
            case wire.Ping():
                self._send(wire.Pong())
        return []

    def _submit(self, engine: EngineSurface, request: Request) -> list[SequenceOutput]:
        try:
            engine.add(request)
        except Exception as error:
            logger.exception("request %s could not be queued", request.id)
            failure = Failure.of(error, "the engine could not take this request")
            return [
                SequenceOutput(
                    request.id, index, finish_reason="error", error=failure.message, error_param=failure.param
                )
                for index in range(request.num_choices)
            ]
        return []

    def _receive(self, wait: bool) -> list[wire.ToEngine]:
        """All complete messages that have arrived; with `wait`, at least one."""
        messages: list[wire.ToEngine] = []
        while not messages:
            try:
                data = self._socket.recv(_RECV_BYTES, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if not data:
                raise Disconnected
            messages = [self._decoder.decode(frame) for frame in self._reader.feed(data)]
        return messages

    def _send(self, message: wire.FromEngine) -> None:
        with self._sending:
            self._socket.sendall(self._encoder.encode(message))

    def _identified(self, weights_sha256: str) -> None:
        with contextlib.suppress(OSError):  # the parent has gone in the meantime
            self._send(wire.Identified(weights_sha256))

    def _lose(self, reason: str) -> NoReturn:
        """Sends the reason and ends the process, from another thread: the main one may be blocked for good."""
        with contextlib.suppress(OSError, ValueError):  # the main thread may have noticed, and closed the socket
            self._fail(reason)
            _linger(self._socket)
        os._exit(1)

    def _fail(self, message: str, hint: str | None = None) -> int:
        self._send(wire.Failed(message, hint))
        return 1


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    # Idle torch threads sleep instead of spinning, because the native kernels' threads need their cores. The variable
    # is read when torch is loaded; a value that is already set is kept.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s engine: %(message)s")
    module, _, function = argv[2].partition(":")

    def load(
        options: EngineOptions, on_progress: Callable[[str], None], on_lost: Callable[[str], None]
    ) -> EngineSurface:
        on_progress("importing the model's libraries")
        loader: LoadEngine = getattr(importlib.import_module(module), function)
        return loader(options, on_progress, on_lost)

    with socket.socket(fileno=int(argv[1])) as connection:
        status = Worker(connection, load).run()
        _linger(connection)
    return status


def _linger(connection: socket.socket) -> None:
    """Waits until the parent has read the last message: closing with unread input would discard it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        waiter = select.poll()  # select.select fails for descriptors from 1,024 on
        waiter.register(connection, select.POLLIN)
        waiter.poll(1000.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
