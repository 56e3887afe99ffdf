"""Against PEFT's XLoraModel: same weights, same process, one request, greedy. Tokens are compared in the same run.

    python -m benchmarks.vs_peft [--model DIR] [--lengths 32 128 512] [--prompt-tokens 64] [--repeats 3] [--eager-only]

A row per length and per engine, eager and compiled. No drafts are copied from earlier text, and no prompt is found in
the prefix cache. `ratio` and `compiled_ratio` are ours over PEFT's tokens per second at 128 tokens; PEFT runs its own
`generate`, once where that takes long. Medians count, on both sides.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import DEMO, Bar, EngineRun, emit, make_engine, print_row, prompt_tokens, run_engine
from service.engine.engine import Engine
from tests.oracle import PeftOracle

_BARS = {("eager", 128): 18.0, ("eager", 512): 28.0, ("compiled", 128): 30.0, ("compiled", 512): 60.0}
_LONG = 256  # tokens from which on PEFT runs once: most of a minute


def peft_generate(oracle: PeftOracle, prompt: list[int], max_tokens: int) -> tuple[float, list[int]]:
    """PEFT's own generate. Returns seconds and tokens."""
    ids = torch.tensor([prompt])
    started = time.perf_counter()
    with torch.inference_mode():
        output = oracle.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return time.perf_counter() - started, output[0, len(prompt) :].tolist()


def compare(
    engines: dict[str, Engine], oracle: PeftOracle, prompt: list[int], length: int, repeats: int
) -> list[dict[str, Any]]:
    """One row per engine: all take turns with PEFT, so that a busy machine is busy for everyone."""
    ours: dict[str, list[EngineRun]] = {name: [] for name in engines}
    theirs: list[float] = []
    tokens: list[int] = []
    for number in range(repeats):
        for name, engine in engines.items():
            ours[name].append(run_engine(engine, [prompt], length))
        if length < _LONG or number == 0:
            seconds, tokens = peft_generate(oracle, prompt, length)
            theirs.append(seconds)
    rows = []
    for name, runs in ours.items():
        seconds = median(run.seconds for run in runs)
        row = {
            "engine": name,
            "tokens": length,
            "ours_tokens_per_second": length / seconds,
            "peft_tokens_per_second": length / median(theirs),
            "ratio": median(theirs) / seconds,
            "tokens_equal": all(run.tokens["0"] == tokens for run in runs),
            "draft_hit_rate": runs[0].draft_hit_rate,
            "forwards_per_token": runs[0].steps / length,
        }
        print_row(row)
        rows.append(row)
    return rows


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """What the rows must show."""
    bars = [
        Bar(f"{row['engine']}, 64 + {row['tokens']} tokens: ours over PEFT", ">=", limit, row["ratio"])
        for row in rows
        if (limit := _BARS.get((row["engine"], row["tokens"]))) is not None
    ]
    return [*bars, Bar("tokens equal to PEFT's", "==", True, all(row["tokens_equal"] for row in rows))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads of both sides; default: the engine's")
    parser.add_argument("--no-lookahead", action="store_true")
    parser.add_argument("--eager-only", action="store_true", help="compile nothing")
    args = parser.parse_args()
    lookahead = not args.no_lookahead
    names = ["eager"] if args.eager_only else ["eager", "compiled"]
    engines = {
        name: make_engine(args.model, compiled=name == "compiled", threads=args.threads, lookahead=lookahead)
        for name in names
    }
    oracle = PeftOracle(args.model)
    prompt = prompt_tokens(args.model, args.prompt_tokens)
    for engine in engines.values():
        run_engine(engine, [prompt], 16)
    peft_generate(oracle, prompt, 4)
    rows = [row for length in args.lengths for row in compare(engines, oracle, prompt, length, args.repeats)]
    result: dict[str, Any] = {"benchmark": "vs_peft", "lookahead": lookahead, "threads": torch.get_num_threads()}
    for name, key in (("eager", "ratio"), ("compiled", "compiled_ratio")):
        own = [row for row in rows if row["engine"] == name]
        if own:
            result[key] = min(own, key=lambda row: abs(row["tokens"] - 128))["ratio"]
    emit({**result, "rows": rows}, bars_of(rows) if args.prompt_tokens == 64 and lookahead else ())


if __name__ == "__main__":
    main()
