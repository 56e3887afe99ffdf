"""Concurrent requests through HTTP against the engine alone and against transformers' static batch of the plain base.

    python -m benchmarks.throughput [--model DIR] [--concurrency 1 4 16 32] [--tokens 128] [--repeats 3]

    scaling        aggregate tokens/s through HTTP at 16 over that at 1
    http_cost      1 - tokens/s through HTTP and streaming / tokens/s of the engine in-process, per concurrency
    vs_base_batch  tokens/s through HTTP at 16 over `generate` of the plain base on one static batch of 16

The client runs on the same cores as the server. Time to first token and the gaps between tokens are the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import DEMO, emit, percentiles, print_row, prompt_tokens, run_engine
from benchmarks.http_client import Streamed, stream_generate
from service.engine.engine import Engine
from service.engine.loader import load_engine
from service.engine.options import EngineOptions
from tests.server_process import server


async def burst(port: int, prompts: list[list[int]], tokens: int) -> tuple[float, list[Streamed]]:
    """All prompts at once. Returns seconds until the last answer ended, and the answers."""
    bodies = [{"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} for prompt in prompts]
    started = time.perf_counter()
    answers = await asyncio.gather(*(stream_generate(port, body) for body in bodies))
    return time.perf_counter() - started, answers


def measure(
    port: int, engine: Engine, base: BaseBatch, prompts: list[list[int]], tokens: int, repeats: int
) -> dict[str, Any]:
    """One row: HTTP, the bare engine and the plain base take turns; the fastest of each counts."""
    http, bare, plain, answers = [], [], [], []
    for _ in range(repeats):
        seconds, streamed = asyncio.run(burst(port, prompts, tokens))
        http.append(seconds)
        answers += streamed
        bare.append(run_engine(engine, prompts, tokens).seconds)
        plain.append(base.seconds(prompts, tokens))
    total = len(prompts) * tokens
    row = {
        "concurrency": len(prompts),
        "http_tokens_per_second": total / min(http),
        "engine_tokens_per_second": total / min(bare),
        "base_batch_tokens_per_second": total / min(plain),
        "http_cost": 1 - min(bare) / min(http),
        "vs_base_batch": min(plain) / min(http),
        "first_token_seconds": percentiles([answer.first_token_seconds for answer in answers]),
        "inter_token_seconds": percentiles([gap for answer in answers for gap in answer.gaps_seconds]),
    }
    print_row(row)
    return row


class BaseBatch:
    """transformers' own generate on the plain base: one static batch of equally long prompts, eager, KV cache."""

    def __init__(self, model: Path) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(model / "base", dtype=torch.float32).eval()

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """How long it takes for `tokens` tokens each."""
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            self._base.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads on every side; default: the server's own"
    )
    args = parser.parse_args()
    flags = ["--model", str(args.model), "--dtype", "float32"]
    flags += ["--threads", str(args.threads)] if args.threads else []
    engine = load_engine(EngineOptions(str(args.model), dtype="float32", threads=args.threads))
    base = BaseBatch(args.model)
    prompts = [prompt_tokens(args.model, 64, seed=number) for number in range(max(args.concurrency))]
    with server(*flags) as running:
        measure(running.port, engine, base, prompts, 16, 1)  # warm-up of all three
        rows = [
            measure(running.port, engine, base, prompts[:number], args.tokens, args.repeats)
            for number in args.concurrency
        ]
    by = {row["concurrency"]: row for row in rows}
    result: dict[str, Any] = {"benchmark": "throughput", "rows": rows}
    if 1 in by and 16 in by:
        result["scaling"] = by[16]["http_tokens_per_second"] / by[1]["http_tokens_per_second"]
        result["vs_base_batch"] = by[16]["vs_base_batch"]
    emit(result)


if __name__ == "__main__":
    main()
