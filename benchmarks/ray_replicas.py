"""Two replicas on Ray Serve against one, and one against the server without Ray: tokens/s and time to the first token.

    python -m benchmarks.ray_replicas [--model DIR] [--concurrency 16] [--tokens 64] [--repeats 3] [--replicas 2]

    replicas_ratio   tokens/s of several replicas over one, every engine with one thread
    proxy_ratio      tokens/s of one replica behind Ray's proxy over the same server reached directly
    first_token      milliseconds to the first token, one request at a time, through the proxy and directly

All of it runs on this machine: with fewer free cores than engines plus proxy, API processes and this client,
replicas_ratio says that replicas share the load, not what they would do on machines of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, emit, print_row, prompt_tokens
from benchmarks.http_client import stream_generate
from tests.support.server_process import server


async def burst(port: int, prompts: list[list[int]], tokens: int) -> float:
    """Seconds until all prompts, sent at once, have all their tokens."""
    bodies = [{"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} for prompt in prompts]
    started = time.perf_counter()
    await asyncio.gather(*(stream_generate(port, body) for body in bodies))
    return time.perf_counter() - started


async def first_token(port: int, prompts: list[list[int]]) -> float:
    """Median seconds to the first token, one request after another."""
    answers = [await stream_generate(port, {"prompt": prompt, "max_tokens": 2}) for prompt in prompts]
    return statistics.median(answer.first_token_seconds for answer in answers)


def measure(ports: dict[str, int], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All servers in turns; the fastest burst of each counts."""
    rows: dict[str, dict[str, float]] = {name: {"seconds": float("inf"), "first_token": 0.0} for name in ports}
    for repeat in range(args.repeats + 1):  # the first warms up
        prompts = [prompt_tokens(args.model, 64, seed=repeat * 1000 + one) for one in range(args.concurrency)]
        for name, port in ports.items():
            seconds = asyncio.run(burst(port, prompts, args.tokens))
            if repeat:
                rows[name]["seconds"] = min(rows[name]["seconds"], seconds)
    for name, port in ports.items():
        rows[name]["first_token"] = asyncio.run(first_token(port, prompts))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ready-seconds", type=float, default=180)
    args = parser.parse_args()
    flags = ["--model", str(args.model), "--threads", "1", "--no-prefix-cache", "--kv-memory", "64MiB"]
    ray = {"command": "cluster", "ready_seconds": args.ready_seconds}
    several = f"{args.replicas} replicas"
    with (
        server(*flags) as direct,
        server(*flags, "--replicas", "1", **ray) as one,
        server(*flags, "--replicas", str(args.replicas), **ray) as many,
    ):
        ports = {"direct": direct.port, "1 replica": one.port, several: many.port}
        rows = measure(ports, args)
    speed = {name: args.concurrency * args.tokens / row["seconds"] for name, row in rows.items()}
    shown: list[dict[str, Any]] = [
        {"server": name, "tokens_per_second": speed[name], "first_token_ms": 1000 * rows[name]["first_token"]}
        for name in rows
    ]
    for row in shown:
        print_row(row)
    emit(
        {
            "benchmark": "ray_replicas",
            "model": str(args.model),
            "concurrency": args.concurrency,
            "tokens": args.tokens,
            "free_cores": max(0.0, (os.cpu_count() or 1) - os.getloadavg()[0]),
            "rows": shown,
            "replicas_ratio": speed[several] / speed["1 replica"],
            "proxy_ratio": speed["1 replica"] / speed["direct"],
        }
    )


if __name__ == "__main__":
    main()
