"""One model in one process and in two, on a CPU: tokens per second of the same requests through both engines.

    python -m benchmarks.tensor_parallel [--hidden 1024] [--layers 14] [--streams 1 8] [--tokens 32] [--repeats 3]

A random Llama of about 250M parameters with two experts, one torch thread per process, greedy, 64 prompt tokens; tokens
must be equal. With as many cores as processes this shows what a second core brings when each rank reads half of the
weights, less the cost of the sums between them over gloo's loopback sockets. It shows nothing of GPUs and NCCL. On a
machine that is busy otherwise it shows the slower of the two cores, because every sum waits for both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Bar, emit, print_row
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.engine import Engine
from service.engine.loader import load_engine
from tests.support.bundles import ALL_TARGETS, make_bundle
from tests.support.driver import run, words

PROMPT_TOKENS = 64
VOCABULARY = 32_000


def tokens_per_second(engine: Engine, streams: int, tokens: int, seed: int) -> tuple[float, list[list[int]]]:
    """Of `streams` equal requests at once, prefill included, and what they generated."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    asked = [
        Request(f"r{number}", words(seed * 1000 + number, PROMPT_TOKENS, VOCABULARY), sampling)
        for number in range(streams)
    ]
    started = time.perf_counter()
    outcome = run(engine, asked)
    seconds = time.perf_counter() - started
    return streams * tokens / seconds, [outcome[request.id].tokens for request in asked]


def measure(engines: dict[int, Engine], streams: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians of all rounds but the first; the engines take turns, and must agree."""
    rates: dict[int, list[float]] = {ranks: [] for ranks in engines}
    differing = 0
    for round_number in range(repeats + 1):
        said = []
        for ranks, engine in engines.items():
            rate, generated = tokens_per_second(engine, streams, tokens, round_number)
            said.append(generated)
            if round_number:
                rates[ranks].append(rate)
        differing += sum(one != other for one, other in zip(*said, strict=True))
    one, two = median(rates[1]), median(rates[2])
    return {"streams": streams, "one": one, "two": two, "ratio": two / one, "requests_that_differ": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = {"intermediate_size": 4 * args.hidden, "num_attention_heads": 16, "num_key_value_heads": 4}
        path = make_bundle(
            Path(folder) / "random",
            hidden=args.hidden,
            layers=args.layers,
            vocab=VOCABULARY,
            experts=["a", "b"],
            targets=ALL_TARGETS,
            strength=0.3,
            base_config={**shape, "head_dim": args.hidden // 16},
            xlora={"layerwise_scalings": True},
        )
        size = sum(file.stat().st_size for file in (path / "base").glob("*.safetensors")) // 4
        options = {"threads": 1, "max_model_len": 256, "max_num_seqs": max(args.streams), "prefix_cache": False}
        engines = {
            ranks: load_engine(EngineOptions(str(path), device="cpu", tensor_parallel=ranks, **options))
            for ranks in (1, 2)
        }
        rows = [measure(engines, streams, args.tokens, args.repeats) for streams in args.streams]
    for row in rows:
        print_row(row)
    differing = sum(row["requests_that_differ"] for row in rows)
    bars = [Bar("requests whose tokens differ between one process and two", "<=", 0, differing)]
    emit({"benchmark": "tensor_parallel", "parameters": size, "threads_per_rank": 1, "rows": rows}, bars)


if __name__ == "__main__":
    main()
