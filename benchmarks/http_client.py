"""A light HTTP client for measuring: one asyncio protocol on uvloop that keeps the bytes and when they came.

Nothing is parsed while an answer streams in, but that events are counted by the empty lines that end them; JSON is read
after the last byte. What the client costs is its process's CPU time: `time.process_time` tells.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop

_T = TypeVar("_T")
_TAIL_BYTES = 4096  # of a stream: enough for its last two events


@dataclass
class Answer:
    """One answer, its head included: when it was asked for, and which bytes came when, in seconds of one clock."""

    started: float
    ended: float = 0.0
    chunks: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Raises ConnectionError where the server closed without a word."""
        if not self.chunks:
            raise ConnectionError("the server closed the connection without an answer")
        return int(self.data[9:12])

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.chunks)


class _Exchange(asyncio.Protocol):
    """Sends one request, collects what comes until the server closes."""

    def __init__(self, request: bytes, done: asyncio.Future[Answer]) -> None:
        self._request = request
        self._done = done
        self._answer = Answer(time.perf_counter())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._answer.chunks.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._answer.ended = time.perf_counter()
        if not self._done.done():
            self._done.set_result(self._answer)


def request(path: str, payload: bytes, method: str = "POST") -> bytes:
    """A request with a JSON body, on a connection of its own."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    )
    return f"{head}Connection: close\r\n\r\n".encode() + payload


async def post(port: int, path: str, payload: bytes, method: str = "POST") -> Answer:
    """Sends a JSON body on a connection of its own and waits for the end of the answer, whatever its status."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Answer] = loop.create_future()
    sent = request(path, payload, method)
    await loop.create_connection(lambda: _Exchange(sent, done), "127.0.0.1", port)
    return await done


@dataclass
class Streamed:
    """One streamed answer: when it was asked for and when each token came, in seconds of one monotonic clock."""

    started: float
    token_times: list[float]
    usage: dict[str, Any]

    @property
    def first_token_seconds(self) -> float:
        return self.token_times[0] - self.started

    @property
    def gaps_seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


async def stream_generate(port: int, body: dict[str, Any]) -> Streamed:
    """POST /generate with stream on. Raises RuntimeError when the status is not 200, or the stream is cut short."""
    answer = await post(port, "/generate", json.dumps({**body, "stream": True}).encode())
    if answer.status != 200:
        raise RuntimeError(answer.data.decode(errors="replace"))
    times = event_times(answer)
    tail = b"".join(data for _, data in answer.chunks[-4:])[-_TAIL_BYTES:]
    if b"data: [DONE]" not in tail:
        raise RuntimeError("the stream ended early")
    last = tail[: tail.index(b"data: [DONE]")].rindex(b"data: {") + len(b"data: ")
    usage = json.loads(tail[last : tail.index(b"\n", last)])["usage"]
    return Streamed(answer.started, times[:-2], usage)  # the last two are the usage and [DONE]


def event_times(answer: Answer) -> list[float]:
    """When each event was complete. One ends with an empty line; the head and the chunks' frames have CR LF."""
    times: list[float] = []
    last = b""
    for moment, data in answer.chunks:
        times += [moment] * (last + data).count(b"\n\n")
        last = data[-1:]
    return times


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a client to its end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
