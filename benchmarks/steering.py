"""Steered and plain requests at once, over as many plain ones: what a gate of one's own costs everybody.

    python -m benchmarks.steering [--model DIR] [--requests 64] [--tokens 64]

Every second request is steered, in four ways in turn: an expert left out, a temperature, another k, a fixed gate (which
has no scaling stream, and so is cheaper than a plain one; that row is shown apart). Greedy, in turns, medians.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import DEMO, emit, make_engine, print_row, prompt_tokens
from service.contract.request import Request, SamplingParams
from service.contract.steering import GateWeight, Steering
from service.engine.engine import Engine

_CLASSIFIED = [Steering(only=(0, 1)), Steering(temperature=0.5), Steering(top_k=1)]  # as the contract's canonical form
_FIXED = [Steering(weights=(GateWeight(0, 1.0),))]
_KINDS: dict[str, list[Steering]] = {"plain": [], "steered": _CLASSIFIED, "steered and fixed": _CLASSIFIED + _FIXED}
_PROMPT = 64  # tokens


def seconds(engine: Engine, prompts: list[list[int]], tokens: int, kinds: list[Steering]) -> float:
    """Until the engine is idle again."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        steering = kinds[number // 2 % len(kinds)] if kinds and number % 2 else None
        engine.add(Request(str(number), prompt, params, steering=steering))
    while engine.has_work():
        engine.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    engine = make_engine(args.model, max_num_seqs=args.requests)
    prompts = [prompt_tokens(args.model, _PROMPT, seed) for seed in range(args.requests)]
    taken: dict[str, list[float]] = {name: [] for name in _KINDS}
    for _ in range(args.repeats + 1):
        for name, kinds in _KINDS.items():
            taken[name].append(seconds(engine, prompts, args.tokens, kinds))
    rows: list[dict[str, Any]] = []
    for name, all_seconds in taken.items():
        rate = args.requests * args.tokens / median(all_seconds[1:])  # the first round warms up
        rows.append({"requests": args.requests, "half of them": name, "tokens_per_second": rate})
        rows[-1]["over_plain"] = rate / rows[0]["tokens_per_second"]
        print_row(rows[-1])
    emit({"benchmark": "steering", "rows": rows})


if __name__ == "__main__":
    main()
