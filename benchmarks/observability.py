"""What it costs to look: streamed full scalings, the metrics, and the scalings log, each against the same without.

    python -m benchmarks.observability [--model DIR] [--clients 16] [--tokens 96] [--repeats 5]

    full scalings   1 - tokens/s with return_scalings "full" / with none, streamed, all clients at once
    metrics         CPU time of both processes per token, over that of a server that observes nothing, minus 1
    scalings log    the same, over a server whose log is off

Both sides take turns. CPU time is what a saturated machine's throughput is made of, and two per cent of throughput
cannot be told from noise on a shared one; medians of the turns count. Without the prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, ROOT, Bar, emit, print_row, prompt_tokens
from benchmarks.http_client import stream_generate
from tests.server_process import free_port

_READY_SECONDS = 240.0


@dataclass(frozen=True)
class Turn:
    """One burst of requests."""

    seconds: float
    cpu_seconds: float  # of the server's two processes


class Served:
    """A server started from a module, with its engine's process."""

    def __init__(self, module: str, model: Path) -> None:
        self.port = free_port()
        flags = ["--model", str(model), "--port", str(self.port), "--log-level", "warning", "--no-prefix-cache"]
        self.process = subprocess.Popen([sys.executable, "-m", module, "serve", *flags], cwd=ROOT)

    def wait_ready(self) -> None:
        """Raises RuntimeError when it does not come up."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.send("GET", "/readyz")
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the server did not become ready")

    def send(self, method: str, path: str, body: Any = None) -> None:
        """One request whose answer does not matter, but for its status."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method))

    def cpu_seconds(self) -> float:
        """Of the API's process and the engine's."""
        parent = self.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        ticks = sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[11:13]))
                    for pid in (parent, *children))  # fmt: skip
        return ticks / os.sysconf("SC_CLK_TCK")

    def turn(self, prompts: list[list[int]], tokens: int, **fields: Any) -> Turn:
        """All prompts at once, streamed."""
        shared = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
        before = self.cpu_seconds()
        started = time.perf_counter()

        async def burst() -> None:
            await asyncio.gather(*(stream_generate(self.port, {"prompt": prompt, **shared}) for prompt in prompts))

        asyncio.run(burst())
        return Turn(time.perf_counter() - started, self.cpu_seconds() - before)


@contextmanager
def servers(*modules: str, model: Path) -> Iterator[list[Served]]:
    """Several at once; only one is asked at a time."""
    running = [Served(module, model) for module in modules]
    try:
        for one in running:
            one.wait_ready()
        yield running
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    prompts = [prompt_tokens(args.model, 64, seed=number) for number in range(args.clients)]
    turns: dict[str, list[Turn]] = {"none": [], "mean": [], "full": [], "unmetered": [], "logged": []}
    with servers("service", "benchmarks.unmetered", model=args.model) as (metered, unmetered):
        for server in (metered, unmetered):
            server.turn(prompts, 8, return_scalings="full")  # warm-up
        for _ in range(args.repeats):
            for kind in ("none", "mean", "full"):
                turns[kind].append(metered.turn(prompts, args.tokens, return_scalings=kind))
            turns["unmetered"].append(unmetered.turn(prompts, args.tokens))
            metered.send("PUT", "/scalings/log", {"enabled": True})
            turns["logged"].append(metered.turn(prompts, args.tokens))
            metered.send("PUT", "/scalings/log", {"enabled": False})
    total = args.clients * args.tokens
    rows = []
    for kind, taken in turns.items():
        seconds, cpu = (
            statistics.median(values) for values in zip(*((t.seconds, t.cpu_seconds) for t in taken), strict=True)
        )
        rows.append({"side": kind, "tokens_per_second": total / seconds, "cpu_us_per_token": 1e6 * cpu / total})
        print_row(rows[-1])
    by = {row["side"]: row for row in rows}

    def more(side: str, base: str) -> float:
        return float(by[side]["cpu_us_per_token"]) / float(by[base]["cpu_us_per_token"]) - 1

    lost = 1 - float(by["full"]["tokens_per_second"]) / float(by["none"]["tokens_per_second"])
    bars = [
        Bar(f"throughput that full scalings cost at {args.clients} clients", "<=", 0.20, lost),
        Bar("CPU time that the metrics cost", "<=", 0.02, more("none", "unmetered")),
        Bar("CPU time that the scalings log costs", "<=", 0.05, more("logged", "none")),
    ]
    emit({"benchmark": "observability", "clients": args.clients, "rows": rows}, bars)


if __name__ == "__main__":
    main()
