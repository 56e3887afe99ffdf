"""What it costs to look: streamed full scalings, the metrics, and the scalings log, each against the same without.

    python -m benchmarks.observability [--model DIR] [--clients 16] [--tokens 48] [--rounds 30]

    metrics         CPU time spent in feeding them, over all other CPU time of both processes (timed.py)
    full scalings   CPU time per token with return_scalings "full", over that with none, minus 1
    scalings log    the same with the log on, over a server whose log is off
    switched off    the metrics once more: over a server that observes nothing (unmetered.py), minus 1

The first is taken within one burst of requests: whatever neighbours do to a machine they do to both parts. The others
compare bursts that follow each other in random order, every side once a round, by their ratio within the round. Medians
over the rounds count, with the 95 % interval of a bootstrap; a cost is under a bar when its whole interval is. CPU time
is what a saturated machine's throughput is made of. Without the prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, ROOT, Bar, emit, print_row, prompt_tokens
from benchmarks.http_client import run, stream_generate
from benchmarks.timed import VARIABLE, Clocks
from tests.support.server_process import free_port

_READY_SECONDS = 240.0
_PROMPT_TOKENS = 24
_RESAMPLES = 4000

Rounds = list[dict[str, float]]  # seconds of CPU time by side


class Served:
    """A server started from a module, with its engine's process."""

    def __init__(self, module: str, model: Path, **variables: str) -> None:
        self.port = free_port()
        flags = ["--model", str(model), "--port", str(self.port), "--log-level", "warning", "--no-prefix-cache"]
        command = [sys.executable, "-m", module, "serve", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables)

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
        return sum(map(_cpu_seconds, [parent, *map(int, children)]))

    def burst(self, prompts: list[list[int]], tokens: int, scalings: str = "none") -> float:
        """All prompts at once, streamed. Returns seconds of CPU time."""
        shared = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_scalings": scalings}
        before = self.cpu_seconds()

        async def all_at_once() -> None:
            await asyncio.gather(*(stream_generate(self.port, {"prompt": prompt, **shared}) for prompt in prompts))

        run(all_at_once())
        return self.cpu_seconds() - before

    def logged_burst(self, prompts: list[list[int]], tokens: int) -> float:
        """The same with the scalings log on."""
        self.send("PUT", "/scalings/log", {"enabled": True})
        seconds = self.burst(prompts, tokens)
        self.send("PUT", "/scalings/log", {"enabled": False})
        return seconds


def _cpu_seconds(pid: int) -> float:
    """Of all threads of another process, to the nanosecond where /proc/PID/stat has ticks of 10 ms."""
    return time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid(3) names


@contextmanager
def servers(model: Path, clocks: Path) -> Iterator[tuple[Served, Served]]:
    """One with clocks and one without metrics; only one is asked at a time."""
    running = Served("benchmarks.timed", model, **{VARIABLE: str(clocks)}), Served("benchmarks.unmetered", model)
    try:
        for one in running:
            one.wait_ready()
        yield running
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait(30)


def cost(rounds: Rounds, side: str, base: str) -> dict[str, Any]:
    """CPU time of a side over that of another in the same round, minus 1: median and 95 % interval."""
    logs = [math.log(one[side] / one[base]) for one in rounds]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(logs, k=len(logs))) for _ in range(_RESAMPLES))
    ends = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES)]
    interval = [math.expm1(end) for end in ends]
    return {"side": side, "over": base, "cost": math.expm1(statistics.median(logs)), "interval": interval}


def bars_of(costs: Sequence[dict[str, Any]], clients: int) -> list[Bar]:
    """Of the upper ends."""
    limits = {"none": ("the metrics", 0.02), "full": ("full scalings", 0.25), "logged": ("the scalings log", 0.05)}
    return [
        Bar(f"CPU time that {what} cost at {clients} clients, 95 % at most", "<=", limit, one["interval"][1])
        for one in costs
        for what, limit in [limits[one["side"]]]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    prompts = [prompt_tokens(args.model, _PROMPT_TOKENS, seed=number) for number in range(args.clients)]
    rng = random.Random(0)
    rounds: Rounds = []
    with tempfile.TemporaryDirectory() as folder:
        clocks = Clocks.create(Path(folder) / "clocks")
        with servers(args.model, Path(folder) / "clocks") as (timed, unmetered):
            sides: dict[str, Callable[[], float]] = {
                "none": partial(timed.burst, prompts, args.tokens),
                "full": partial(timed.burst, prompts, args.tokens, "full"),
                "logged": partial(timed.logged_burst, prompts, args.tokens),
                "unmetered": partial(unmetered.burst, prompts, args.tokens),
            }
            for burst in sides.values():
                burst()  # warm-up
            for _ in range(args.rounds):
                rounds.append(one_round(sides, clocks, rng))
    pairs = (("none", "unobserved"), ("full", "none"), ("logged", "none"), ("none", "unmetered"))
    costs = [cost(rounds, side, base) for side, base in pairs]
    for row in costs:
        print_row(row)
    total = args.clients * args.tokens
    spent = {side: 1e6 * statistics.median(one[side] for one in rounds) / total for side in sides}
    result = {"clients": args.clients, "rounds": args.rounds, "costs": costs, "cpu_us_per_token": spent}
    emit({"benchmark": "observability", **result}, bars_of(costs[:3], args.clients))


def one_round(sides: dict[str, Callable[[], float]], clocks: Clocks, rng: random.Random) -> dict[str, float]:
    """Every side once; and of "none" the part that is not the metrics'."""
    seconds = {}
    for side in rng.sample(list(sides), len(sides)):
        before = clocks.total
        seconds[side] = sides[side]()
        if side == "none":
            seconds["unobserved"] = seconds[side] - (clocks.total - before)
    return seconds


if __name__ == "__main__":
    main()
