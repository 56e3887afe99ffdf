"""Cost of a token as the context grows, one request: ours and PEFT's.

    python -m benchmarks.context [--model DIR] [--contexts 128 512 1024 2048] [--tokens 64] [--repeats 5]

A prompt of that many tokens, then `--tokens` more, timed after the first. Drafts are forced to agree, so that every
context has the same steps (one real and one scaling row each) whatever the text. PEFT is timed on one token: it reads
all of the text twice for each. `growth` is the cost over that at the shortest context.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import DEMO, Bar, emit, make_engine, print_row, prompt_tokens, run_engine
from benchmarks.forced import script
from service.engine.engine import Engine
from tests.support.oracle import PeftOracle


def our_costs(engine: Engine, model: Path, contexts: list[int], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row per context: seconds per token, medians; contexts take turns."""
    costs: dict[int, list[float]] = {length: [] for length in contexts}
    for number in range(-1, repeats):  # the first round warms up
        for length, own in costs.items():
            run = run_engine(engine, [prompt_tokens(model, length)], tokens)
            if number >= 0:
                own.append(1 / run.decode_tokens_per_second)
    return [{"side": "ours", "context": length, "seconds": median(own)} for length, own in costs.items()]


def peft_costs(model: Path, contexts: list[int]) -> list[dict[str, Any]]:
    """A row per context: seconds of one token, for which PEFT reads everything twice. The faster of two."""
    oracle = PeftOracle(model)
    rows = []
    for length in contexts:
        prompt, seconds = prompt_tokens(model, length), []
        for _ in range(2):
            started = time.perf_counter()
            oracle.greedy(prompt, 1)
            seconds.append(time.perf_counter() - started)
        rows.append({"side": "peft", "context": length, "seconds": min(seconds)})
    return rows


def with_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its cost over that of its side's shortest context."""
    shortest = min(row["context"] for row in rows)
    first = {row["side"]: row["seconds"] for row in rows if row["context"] == shortest}
    return [{**row, "growth": row["seconds"] / first[row["side"]]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="torch threads of both sides; default: the engine's")
    args = parser.parse_args()
    engine = make_engine(args.model, threads=args.threads, draft_depth=1)
    script(engine, [1.0])
    rows = our_costs(engine, args.model, args.contexts, args.tokens, args.repeats)
    rows = with_growth(rows + peft_costs(args.model, args.contexts))
    for row in rows:
        print_row(row)
    longest = max(args.contexts)
    bars = [
        Bar(f"seconds per token at {longest} tokens over {min(args.contexts)}", "<=", 1.5, row["growth"])
        for row in rows
        if row["context"] == longest and row["side"] == "ours"
    ]
    emit({"benchmark": "context", "threads": torch.get_num_threads(), "rows": rows}, bars)


if __name__ == "__main__":
    main()
