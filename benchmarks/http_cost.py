"""What a streamed token costs outside the model: CPU time of the API's process, of the engine's, and of the client.

    python -m benchmarks.http_cost [--model DIR] [--streams 1 16] [--tokens 128] [--repeats 5]
                                   [--against CHECKOUT] [--body '{"return_scalings": "mean"}'] [--path /generate]

    api_us         microseconds of CPU per token in the process that speaks HTTP, requests and metrics included
    engine_us      the same of the engine's process: the model's work, and its side of the socket
    client_us      the same of this client

CPU time counts what was used and not what was waited for, so that neighbours disturb it less than rates. With
--against, a server of another checkout of this repository takes turns with this one's, and `ratio` is ours over
theirs, by medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.common import DEMO, ROOT, Bar, emit, print_row, prompt_tokens
from benchmarks.http_client import event_times, post, run
from tests.support.server_process import Server, server


class Side:
    """One server and the CPU time of its processes."""

    def __init__(self, name: str, running: Server) -> None:
        self.name = name
        self._port = running.port
        self._api = psutil.Process(running.process.pid)
        [self._engine] = [one for one in self._api.children() if "service.engine.worker" in one.cmdline()]

    async def _burst(self, path: str, payloads: list[bytes]) -> int:
        answers = await asyncio.gather(*(post(self._port, path, payload) for payload in payloads))
        for answer in answers:
            if answer.status != 200:
                raise RuntimeError(answer.data.decode(errors="replace"))
        return sum(len(event_times(answer)) for answer in answers)

    def measure(self, path: str, payloads: list[bytes], tokens: int) -> dict[str, float]:
        """All requests at once. Raises RuntimeError where events are missing."""
        before, client, started = self._cpu(), time.process_time(), time.perf_counter()
        events = run(self._burst(path, payloads))
        seconds, client = time.perf_counter() - started, time.process_time() - client
        after, total = self._cpu(), len(payloads) * tokens
        if events < total:
            raise RuntimeError(f"{events} events for {total} tokens")
        api, engine = (1e6 * (late - early) / total for late, early in zip(after, before, strict=True))
        return {
            "api_us": api,
            "engine_us": engine,
            "client_us": 1e6 * client / total,
            "tokens_per_second": total / seconds,
        }

    def _cpu(self) -> tuple[float, float]:
        api, engine = self._api.cpu_times(), self._engine.cpu_times()
        return api.user + api.system, engine.user + engine.system


def compare(sides: list[Side], path: str, payloads: list[bytes], tokens: int, repeats: int) -> dict[str, Any]:
    """One row: the sides take turns; medians."""
    runs: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            runs[side.name].append(side.measure(path, payloads, tokens))
    row: dict[str, Any] = {"streams": len(payloads)}
    for name, measured in runs.items():
        row[name] = {what: median(one[what] for one in measured) for what in measured[0]}
    if len(sides) == 2:
        row["ratio"] = row["ours"]["api_us"] / row["theirs"]["api_us"]
    print_row(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout, such as a git worktree of an older commit")
    parser.add_argument("--path", default="/generate", help="or /v1/completions")
    parser.add_argument("--body", type=json.loads, default={}, help="more fields of each request, as JSON")
    args = parser.parse_args()
    fields = {"max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "stream": True, **args.body}
    payloads = [
        json.dumps({"prompt": prompt_tokens(args.model, 64, seed=number), **fields}).encode()
        for number in range(max(args.streams))
    ]
    flags = ["--model", str(args.model.resolve()), "--dtype", "float32", "--no-prefix-cache"]
    roots = {"ours": ROOT} | ({} if args.against is None else {"theirs": args.against.resolve()})
    with ExitStack() as stack:
        sides = [Side(name, stack.enter_context(server(*flags, root=root))) for name, root in roots.items()]
        for side in sides:
            side.measure(args.path, payloads, args.tokens)  # warm-up
        rows = [compare(sides, args.path, payloads[:number], args.tokens, args.repeats) for number in args.streams]
    bars = [
        Bar(f"API process, CPU per token at {row['streams']} streams, over the other checkout", "<=", 0.5, row["ratio"])
        for row in rows
        if "ratio" in row
    ]
    emit({"benchmark": "http_cost", "path": args.path, "rows": rows}, bars)


if __name__ == "__main__":
    main()
