"""Concurrent requests through HTTP against the engine alone and against transformers' static batch of the plain base.

    python -m benchmarks.throughput [--model DIR] [--concurrency 1 4 16 32] [--tokens 128] [--repeats 3]

    scaling        aggregate tokens/s through HTTP at 16 over that at 1
    http_cost      1 - tokens/s through HTTP and streaming / tokens/s of the engine in-process, per concurrency
    vs_base_batch  tokens/s through HTTP at 16 over `generate` of the plain base on one static batch of 16
    vs_depth_1     tokens/s of the engine with drafts as deep as the bundle has them over those with drafts of one: how
                   deep to draft is the engine's choice, so it is never slower

A server as it is by default, but that no prompt is found in the prefix cache. The client runs on the same cores as the
server; `client_cpu` is its share of one. Time to first token and the gaps between tokens are the client's; tokens that
came in one piece have no gap.

The static batch is `generate` of the base as its authors ship it: the same prompts, all of one length, and the same
number of tokens; fp32, not compiled, transformers' defaults (SDPA attention, a cache that grows), and the torch threads
that the engine beside it has (`threads`). It has no scaling pass, no gate, no HTTP, and cannot take in a request that
comes later.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import DEMO, Bar, build_engines, emit, percentiles, print_row, prompt_tokens, run_engine
from benchmarks.http_client import Streamed, run, stream_generate
from service.contract.options import EngineOptions
from service.engine.engine import Engine
from service.engine.loader import load_checkpoint_and_model
from tests.support.server_process import server


async def burst(port: int, prompts: list[list[int]], tokens: int) -> tuple[float, list[Streamed]]:
    """All prompts at once. Returns seconds until the last answer ended, and the answers."""
    bodies = [{"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} for prompt in prompts]
    started = time.perf_counter()
    answers = await asyncio.gather(*(stream_generate(port, body) for body in bodies))
    return time.perf_counter() - started, answers


def measure(
    port: int, engines: list[Engine], base: BaseBatch, prompts: list[list[int]], tokens: int, repeats: int
) -> dict[str, Any]:
    """One row: HTTP, the bare engine, the same at depth 1 and the plain base take turns; the fastest of each counts.

    Raises RuntimeError where the server has found a prompt in its prefix cache.
    """
    http, bare, shallow, plain, answers, client = [], [], [], [], [], []
    for _ in range(repeats):
        cpu = time.process_time()
        seconds, streamed = run(burst(port, prompts, tokens))
        client.append((time.process_time() - cpu) / seconds)
        http.append(seconds)
        answers += streamed
        for own, engine in zip((bare, shallow), engines, strict=True):
            own.append(run_engine(engine, prompts, tokens).seconds)
        plain.append(base.seconds(prompts, tokens))
    if any(answer.usage["cached_tokens"] for answer in answers):
        raise RuntimeError("prompts were found in the prefix cache")
    total = len(prompts) * tokens
    row = {
        "concurrency": len(prompts),
        "http_tokens_per_second": total / min(http),
        "engine_tokens_per_second": total / min(bare),
        "base_batch_tokens_per_second": total / min(plain),
        "http_cost": 1 - min(bare) / min(http),
        "vs_base_batch": min(plain) / min(http),
        "vs_depth_1": min(shallow) / min(bare),
        "client_cpu": median(client),
        "first_token_seconds": percentiles([answer.first_token_seconds for answer in answers]),
        "inter_token_seconds": percentiles([gap for answer in answers for gap in answer.gaps_seconds]),
    }
    print_row(row)
    return row


class BaseBatch:
    """transformers' generate on the plain base: one static batch of equally long prompts, KV cache, not compiled."""

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


def run_server(args: argparse.Namespace, base: BaseBatch, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """A row per concurrency, all of one server."""
    drafted = args.speculative_tokens
    options = EngineOptions(
        str(args.model), dtype="float32", threads=args.threads, prefix_cache=False, speculative_tokens=drafted
    )
    engines = build_engines(*load_checkpoint_and_model(options), options, (args.draft_depth, 1))
    flags = ["--model", str(args.model), "--dtype", "float32", "--no-prefix-cache"]
    flags += ["--speculative-tokens", str(drafted)]
    flags += ["--threads", str(args.threads)] if args.threads else []
    flags += ["--draft-depth", str(args.draft_depth)] if args.draft_depth else []
    with server(*flags) as running:
        measure(running.port, engines, base, prompts, 16, 1)  # warm-up of all
        return [
            measure(running.port, engines, base, prompts[:number], args.tokens, args.repeats)
            for number in args.concurrency
        ]


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """What the rows must show."""
    by = {row["concurrency"]: row for row in rows}
    if not {1, 16} <= set(by):
        return []
    scaling = by[16]["http_tokens_per_second"] / by[1]["http_tokens_per_second"]
    return [
        Bar("16 requests over one, tokens/s through HTTP", ">=", 5.0, scaling),
        Bar("16 requests over the plain base's static batch", ">=", 0.5, by[16]["vs_base_batch"]),
        Bar("share of the engine's tokens/s that HTTP costs at 16", "<=", 0.15, by[16]["http_cost"]),
        Bar("16 requests in the engine: the bundle's depth over depth 1", ">=", 0.97, by[16]["vs_depth_1"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads on every side; default: the server's own"
    )
    parser.add_argument("--speculative-tokens", type=int, default=8, help="of the server; its default is 8")
    parser.add_argument("--draft-depth", type=int, help="of the server; default: all that the bundle has")
    args = parser.parse_args()
    base = BaseBatch(args.model)
    prompts = [prompt_tokens(args.model, 64, seed=number) for number in range(max(args.concurrency))]
    rows = run_server(args, base, prompts)
    emit({"benchmark": "throughput", "threads": torch.get_num_threads(), "rows": rows}, bars_of(rows))


if __name__ == "__main__":
    main()
