"""What four times too many requests do to a server: the good it still does, and the latency of those it admits.

    python -m benchmarks.overload [--model DIR] [--seconds 15] [--tokens 32] [--factor 4]

    capacity        requests/s of a closed loop with as many clients as the server has places
    goodput_ratio   requests/s answered with 200 at `factor` times the capacity, over those at 1 times
    p99_ratio       p99 latency of the answered ones at `factor` times, over that at 1 times

Requests arrive in open loops (evenly, whatever has become of earlier ones) and are not sent again when refused. The
client shares the cores with the server and reports its CPU share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, emit, percentiles, print_row, prompt_tokens
from tests.server_process import server


@dataclass
class Load:
    """What became of some requests."""

    seconds: float = 0.0
    client_cpu: float = 0.0  # share of one core
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # of those answered with 200
    without_retry_after: int = 0  # refusals that do not say when to come again

    def row(self, name: str) -> dict[str, Any]:
        return {
            "load": name,
            "goodput_per_second": self.statuses[200] / self.seconds,
            "statuses": {str(status): count for status, count in self.statuses.items()},
            "latency_seconds": percentiles(self.latencies),
            "without_retry_after": self.without_retry_after,
            "client_cpu": self.client_cpu,
        }


class Client:
    """One keep-alive-free POST after another, with nothing parsed but the status."""

    def __init__(self, port: int, bodies: list[bytes]) -> None:
        self._port = port
        self._bodies = bodies
        self.load = Load()
        self._sent = 0

    async def send(self) -> None:
        body = self._bodies[self._sent % len(self._bodies)]
        self._sent += 1
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        answer = await reader.read()
        writer.close()
        status = int(answer[9:12])
        self.load.statuses[status] += 1
        self.load.without_retry_after += status == 429 and b"retry-after" not in answer.lower()
        if status == 200:
            self.load.latencies.append(time.perf_counter() - started)

    async def closed(self, clients: int, seconds: float) -> Load:
        """Each client sends its next request when its last is answered."""
        end = time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < end:
                await self.send()

        return await self._timed(asyncio.gather(*(one() for _ in range(clients))))

    async def open(self, per_second: float, seconds: float) -> Load:
        """Requests at even distances."""

        async def arrivals() -> None:
            start = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for number in range(int(per_second * seconds)):
                    await asyncio.sleep(max(0.0, start + number / per_second - time.perf_counter()))
                    group.create_task(self.send())

        return await self._timed(arrivals())

    async def _timed(self, work: Any) -> Load:
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        await work
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.load.seconds = time.perf_counter() - started
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.load.client_cpu = used / self.load.seconds
        return self.load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of the server, without their dashes")
    args = parser.parse_args()
    sampling = {"max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
    bodies = [
        json.dumps({"prompt": prompt_tokens(args.model, 64, seed=number), **sampling}).encode() for number in range(64)
    ]
    flags = [f"--{flag}" if number % 2 == 0 else flag for number, flag in enumerate(args.flags)]
    with server("--model", str(args.model), *flags) as running:
        asyncio.run(Client(running.port, bodies).closed(args.clients, 3.0))
        full = asyncio.run(Client(running.port, bodies).closed(args.clients, args.seconds))
        capacity = full.statuses[200] / full.seconds
        rows = [full.row("closed")]
        print_row(rows[0])
        for factor in (1.0, args.factor):
            load = asyncio.run(Client(running.port, bodies).open(factor * capacity, args.seconds))
            rows.append(load.row(f"{factor:g}x"))
            print_row(rows[-1])
    once, over = rows[1], rows[2]
    emit(
        {
            "benchmark": "overload",
            "capacity": capacity,
            "rows": rows,
            "goodput_ratio": over["goodput_per_second"] / once["goodput_per_second"],
            "p99_ratio": over["latency_seconds"]["p99"] / once["latency_seconds"]["p99"],
        }
    )


if __name__ == "__main__":
    main()
