"""What four times too many requests do to a server: the good it still does, and the latency of those it admits.

    python -m benchmarks.overload [--model DIR] [--seconds 15] [--tokens 32] [--factor 4] [--burst 64]

    capacity        requests/s of a closed loop with as many clients as the server has places
    goodput_ratio   requests/s answered with 200 at `factor` times the capacity, over those at 1 times
    p99_ratio       p99 latency of the answered ones at `factor` times, over that at 1 times
    burst           so many requests at once at the idle server, before and after the overload: all are to be answered

Requests arrive in open loops (evenly, whatever has become of earlier ones) and are not sent again when refused. The
client shares the cores with the server and reports its CPU share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, Bar, emit, percentiles, print_row, prompt_tokens
from benchmarks.http_client import post, run
from tests.support.server_process import server

_RETRY_AFTER = re.compile(rb"retry-after: (\d+)", re.IGNORECASE)


@dataclass
class Load:
    """What became of some requests."""

    seconds: float = 0.0
    client_cpu: float = 0.0  # share of one core
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # of those answered with 200
    retry_after: list[int] = field(default_factory=list)  # seconds, of the refusals; 0 where one does not say

    def row(self, name: str) -> dict[str, Any]:
        return {
            "load": name,
            "goodput_per_second": self.statuses[200] / self.seconds,
            "statuses": {str(status): count for status, count in self.statuses.items()},
            "latency_seconds": percentiles(self.latencies),
            "retry_after_seconds": [min(self.retry_after, default=0), max(self.retry_after, default=0)],
            "client_cpu": self.client_cpu,
        }


class Client:
    """One POST after another, each on a connection of its own."""

    def __init__(self, port: int, bodies: list[bytes]) -> None:
        self._port = port
        self._bodies = bodies
        self.load = Load()
        self._sent = 0

    async def send(self) -> None:
        body = self._bodies[self._sent % len(self._bodies)]
        self._sent += 1
        answer = await post(self._port, "/generate", body)
        self.load.statuses[answer.status] += 1
        if answer.status == 200:
            self.load.latencies.append(answer.ended - answer.started)
        elif answer.status == 429:
            said = _RETRY_AFTER.search(answer.data)
            self.load.retry_after.append(int(said[1]) if said else 0)

    async def at_once(self, number: int) -> Load:
        """All of them in one moment."""
        return await self._timed(asyncio.gather(*(self.send() for _ in range(number))))

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

    async def _timed(self, work: Awaitable[Any]) -> Load:
        cpu, started = time.process_time(), time.perf_counter()
        await work
        self.load.seconds = time.perf_counter() - started
        self.load.client_cpu = (time.process_time() - cpu) / self.load.seconds
        return self.load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop")
    parser.add_argument("--burst", type=int, default=64)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of the server, without their dashes")
    args = parser.parse_args()
    sampling = {"max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
    bodies = [
        json.dumps({"prompt": prompt_tokens(args.model, 64, seed=number), **sampling}).encode() for number in range(64)
    ]
    flags = [f"--{flag}" if number % 2 == 0 else flag for number, flag in enumerate(args.flags)]
    rows = []

    def measure(name: str, work: Callable[[Client], Coroutine[Any, Any, Load]]) -> dict[str, Any]:
        rows.append(run(work(Client(running.port, bodies))).row(name))
        print_row(rows[-1])
        return rows[-1]

    with server("--model", str(args.model), *flags) as running:
        measure("warm-up", lambda client: client.closed(args.clients, 3.0))
        first = measure("burst before", lambda client: client.at_once(args.burst))
        capacity = measure("closed", lambda client: client.closed(args.clients, args.seconds))["goodput_per_second"]
        once = measure("1x", lambda client: client.open(capacity, args.seconds))
        over = measure(f"{args.factor:g}x", lambda client: client.open(args.factor * capacity, args.seconds))
        last = measure("burst after", lambda client: client.at_once(args.burst))
    goodput = over["goodput_per_second"] / once["goodput_per_second"]
    p99 = over["latency_seconds"]["p99"] / once["latency_seconds"]["p99"]
    said = over["retry_after_seconds"][0]
    bars = [
        Bar(f"goodput at {args.factor:g} times the capacity, over that at one times", ">=", 0.9, goodput),
        Bar(f"p99 latency of the admitted at {args.factor:g} times, over that at one times", "<=", 2.0, p99),
        Bar(f"{args.burst} at once are all admitted", "==", True, set(first["statuses"]) == {"200"}),
        Bar("... and again after the overload", "==", True, set(last["statuses"]) == {"200"}),
        Bar("Retry-After of the refusals, seconds at least", ">=", 1.0, float(said)),
    ]
    emit(
        {"benchmark": "overload", "capacity": capacity, "rows": rows, "goodput_ratio": goodput, "p99_ratio": p99}, bars
    )


if __name__ == "__main__":
    main()
