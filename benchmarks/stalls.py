"""What one large body does to everybody else: the stall of /livez and of a stream, and the memory of the API process.

    python -m benchmarks.stalls [--model DIR] [--kinds text emoji ...] [--bytes 4194304] [--check]

One body of every kind goes to every route that takes it, one at a time, each as large as the server's default limit.
Meanwhile one connection asks for /livez every 10 ms, and another reads a stream of tokens. Per body:

    livez_seconds    the slowest answer of /livez from the body's first byte until shortly after its answer
    stream_seconds   the longest time without a token in the stream beside it
    rss_bytes        the peak of the API process's resident memory

The first row sends nothing: what it shows is the machine's own noise, and the stream's pace. The client is a process of
its own, but shares the cores. With --check a missed bar is exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, Bar, emit, print_row
from benchmarks.http_client import Answer, post, request, run
from benchmarks.large_bodies import METHODS, Kind, kinds
from tests.support.server_process import Server, server

BODY_BYTES = 4 << 20
STALL_SECONDS = 0.25
RSS_BYTES = 300 * 10**6
_POLL_SECONDS = 0.01
_SETTLE_SECONDS = 0.3  # after an answer: what it left behind is given back meanwhile
_STREAM = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "stream": True}


class Gaps:
    """The longest of some times since the last look."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._longest = 0.0

    def begin(self) -> None:
        """A time begins, unless one has begun that has not ended."""
        self._last = self._last or time.perf_counter()

    def end(self) -> None:
        """It ends, if one has begun."""
        if self._last is not None:
            self._longest = max(self._longest, time.perf_counter() - self._last)
            self._last = None

    def take(self) -> float:
        """The longest, one that has not ended included."""
        if self._last is not None:
            self._longest = max(self._longest, time.perf_counter() - self._last)
        longest, self._longest = self._longest, 0.0
        return longest


class Beside:
    """What others see meanwhile."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.livez = Gaps()
        self.stream = Gaps()

    async def poll(self) -> None:
        """Asks for /livez every 10 ms; a connection that the server has closed meanwhile is opened again."""
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    self.livez.begin()
                    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                    await reader.readuntil(b"}")
                    self.livez.end()
                    await asyncio.sleep(_POLL_SECONDS)
            writer.close()

    async def read(self) -> None:
        """Reads tokens, one stream after another."""
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(request("/generate", json.dumps(_STREAM).encode()))
            while await reader.read(1 << 16):
                self.stream.end()
                self.stream.begin()
            self.stream = Gaps()
            writer.close()


@asynccontextmanager
async def others(port: int) -> Any:
    """Somebody else polls and reads."""
    beside = Beside(port)
    tasks = [asyncio.create_task(beside.poll()), asyncio.create_task(beside.read())]
    try:
        await asyncio.sleep(1.0)
        yield beside
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Memory:
    """The resident memory of a process, as the kernel keeps its peak."""

    def __init__(self, pid: int) -> None:
        self._root = Path(f"/proc/{pid}")

    def forget(self) -> None:
        """The peak counts from now on."""
        (self._root / "clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """The peak since then."""
        lines = (self._root / "status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


async def measure(running: Server, chosen: Sequence[Kind], size: int) -> list[dict[str, Any]]:
    """One row per body, and one for none."""
    memory = Memory(running.process.pid)
    rows = []

    async def observed(kind: str, path: str, beside: Beside, work: Callable[[], Awaitable[Answer | None]]) -> None:
        await asyncio.sleep(_SETTLE_SECONDS)  # this process has just been busy with the body
        memory.forget()
        beside.livez.take(), beside.stream.take()
        started = time.perf_counter()
        answer = await work()
        seconds = time.perf_counter() - started
        await asyncio.sleep(_SETTLE_SECONDS)
        rows.append(
            {
                "kind": kind,
                "path": path,
                "status": None if answer is None else answer.status,
                "seconds": seconds,
                "livez_seconds": beside.livez.take(),
                "stream_seconds": beside.stream.take(),
                "rss_bytes": memory.peak_bytes(),
            }
        )
        print_row(rows[-1])

    async def nothing() -> None:
        await asyncio.sleep(3.0)

    async with others(running.port) as beside:
        await observed("nothing", "", beside, nothing)
        for kind in chosen:
            payload = kind.payload(size)
            method = METHODS.get(kind.path, "POST")
            await observed(kind.name, kind.path, beside, lambda: post(running.port, kind.path, payload, method))  # noqa: B023
    return rows


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Of the worst of all bodies."""
    worst = {name: max(row[name] for row in rows) for name in ("livez_seconds", "stream_seconds", "rss_bytes")}
    return [
        Bar("slowest /livez beside one large body, seconds", "<=", STALL_SECONDS, worst["livez_seconds"]),
        Bar("longest stall of a stream beside it, seconds", "<=", STALL_SECONDS, worst["stream_seconds"]),
        Bar("peak memory of the API process, bytes", "<=", float(RSS_BYTES), float(worst["rss_bytes"])),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--kinds", nargs="*", help="names of kinds; default: all")
    parser.add_argument("--bytes", type=int, default=BODY_BYTES, help="of each body")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    args = parser.parse_args()
    chosen = [kind for kind in kinds() if args.kinds is None or kind.name in args.kinds]
    with server("--model", str(args.model)) as running:
        rows = run(measure(running, chosen, args.bytes))
    bars = bars_of(rows)
    worst = max(rows, key=lambda row: max(row["livez_seconds"], row["stream_seconds"]))
    emit({"benchmark": "stalls", "bodies": len(chosen), "worst": worst, "quiet": rows[0], "rows": rows}, bars)
    sys.exit(1 if args.check and not all(bar.met for bar in bars) else 0)


if __name__ == "__main__":
    main()
