"""A child process that answers one line of JSON with another, and is killed when it takes too long.

For work on what strangers send that nothing can interrupt: it may take minutes, all memory, or its process along. The
lines travel over a socket pair that the event loop reads; child_loop.py is the other end. This file knows no HTTP, and
not what the lines mean.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from service.contract.errors import OverloadedError, UnavailableError

logger = logging.getLogger("xlora")

Answer = TypeVar("Answer", bound=msgspec.Struct)

_END_SECONDS = 1.0  # from the last that is heard of a child to its end, by itself


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of one question."""

    answer_seconds: float
    wait_seconds: float  # until its turn comes
    max_asking: int  # questions at once: one is answered, the others wait
    max_answer_bytes: int
    start_seconds: float = 60.0  # of the process


class NoAnswerError(Exception):
    """A question that is to blame for having no answer; the text says how that came, as in "took over 3 seconds"."""


class TookTooLongError(NoAnswerError):
    """The time for an answer has passed."""


class ChildDiedError(NoAnswerError):
    """The child has ended, or said what is no answer."""


class BoundedProcess(Generic[Answer]):
    """One child, which is started again for the next question after it has been killed. For one event loop."""

    def __init__(self, command: Sequence[str], name: str, param: str, answer: type[Answer], bounds: Bounds) -> None:
        self.bounds = bounds
        self._param = param  # the field of requests that questions come from
        self._decoder = msgspec.json.Decoder(answer)
        self._command = command
        self._name = name  # in messages: "the process that ..."
        self._lock = asyncio.Lock()
        self._asking = 0
        self._child: _Child | None = None  # ready to be asked
        self._starting: asyncio.Task[_Child] | None = None
        self._closed = False

    def start(self) -> None:
        """Begins to start the child, so that the first question need not wait for it."""
        if self._child is None and self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may be nobody's

    async def ask(self, question: object) -> Answer:
        """The answer to a question, which is anything that JSON can say.

        Raises NoAnswerError, UnavailableError where no child can be started and when this is closed, OverloadedError
        where too many others ask. Whoever is cancelled ends the child: its answer would be taken for the next one's.
        """
        self._check_open()
        if self._asking >= self.bounds.max_asking:
            raise OverloadedError(f"too many requests wait for {self._name}", param=self._param)
        self._asking += 1
        try:
            async with self._own_lock():
                return await self._ask(msgspec.json.encode(question) + b"\n")
        finally:
            self._asking -= 1

    def close(self) -> None:
        """Ends the child for good. Whoever waits for an answer, or comes later, hears that the server stops."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
        self._drop()

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the server is stopping", code="stopping", hint="send the request again")

    @asynccontextmanager
    async def _own_lock(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.bounds.wait_seconds):
                await self._lock.acquire()
        except TimeoutError:
            busy = f"{self._name} was busy for {self.bounds.wait_seconds:g} seconds"
            raise OverloadedError(busy, param=self._param) from None
        try:
            self._check_open()
            yield
        finally:
            self._lock.release()

    async def _ask(self, question: bytes) -> Answer:
        child = await self._ready_child()
        try:
            async with asyncio.timeout(self.bounds.answer_seconds):
                return self._decoder.decode(await child.ask(question))
        except TimeoutError:
            self._drop()
            raise TookTooLongError(f"took over {self.bounds.answer_seconds:g} seconds") from None
        except (ChildDiedError, msgspec.DecodeError) as error:
            self._drop()
            self._check_open()
            logger.warning("%s ended without an answer: %s", self._name, error)
            raise ChildDiedError(str(error)) from None
        except asyncio.CancelledError:
            self._drop()
            raise

    async def _ready_child(self) -> _Child:
        if self._child is not None and self._child.has_ended:
            self._drop()
        self.start()
        if self._child is not None:
            return self._child
        assert self._starting is not None
        try:
            return await asyncio.shield(self._starting)  # it goes on for the next one when this one gives up
        except asyncio.CancelledError:
            self._check_open()
            raise

    async def _start(self) -> _Child:
        child: _Child | None = None
        try:
            self._check_open()
            child = _Child(self._command)
            async with asyncio.timeout(self.bounds.start_seconds):
                await child.open(self.bounds.max_answer_bytes)
            self._child = child
            return child
        except (OSError, ChildDiedError) as error:  # too few descriptors, too little memory; or a TimeoutError
            reason = str(error) or f"it took over {self.bounds.start_seconds:g} seconds"
            logger.warning("%s could not be started: %s", self._name, reason)
            raise UnavailableError(f"{self._name} could not be started: {reason}") from None
        finally:
            self._starting = None
            if child is not None and child is not self._child:
                child.end()

    def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    """One process, from its start to its end."""

    def __init__(self, command: Sequence[str]) -> None:
        """Raises OSError where descriptors or memory are short."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())
            except OSError:
                self._socket.close()
                raise
        self._writer: asyncio.StreamWriter | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nobody is there to be asked."""
        return self._process.poll() is not None

    async def open(self, max_answer_bytes: int) -> None:
        """Waits until it is ready for questions. Raises ChildDiedError."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=max_answer_bytes)
        await self._read_line()

    async def ask(self, question: bytes) -> bytes:
        """Raises ChildDiedError."""
        assert self._writer is not None
        with suppress(ConnectionError):  # the end of what it says comes next
            self._writer.write(question)
            await self._writer.drain()
        return await self._read_line()

    def end(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        if self._writer is not None:
            self._writer.transport.abort()
        asyncio.get_running_loop().run_in_executor(None, self._process.wait)  # one of 2 GiB takes a while to go

    async def _read_line(self) -> bytes:
        line = b""
        with suppress(ConnectionError):
            try:
                line = await self._reader.readline()
            except ValueError:
                raise ChildDiedError("answered more than is allowed") from None
        if not line.endswith(b"\n"):
            raise ChildDiedError(await asyncio.to_thread(_how_it_ended, self._process))
        return line[:-1]


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return "stopped answering"
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
