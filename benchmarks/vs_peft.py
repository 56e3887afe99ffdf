"""Against PEFT's XLoraModel: same weights, same process, one request, greedy. Tokens are compared in the same run.

    python -m benchmarks.vs_peft [--model DIR] [--lengths 32 128 512] [--prompt-tokens 64] [--repeats 3]

A row per length. No drafts are copied from earlier text, and no prompt is found in the prefix cache. `ratio` is ours
over PEFT's tokens per second at 128 tokens; PEFT runs its own `generate`, once where that takes long. Medians count, on
both sides.
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
from tests.support.oracle import PeftOracle

_BARS = {128: 18.0, 512: 28.0}  # by tokens
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


def compare(engine: Engine, oracle: PeftOracle, prompt: list[int], length: int, repeats: int) -> dict[str, Any]:
    """One row: ours takes turns with PEFT, so that a busy machine is busy for both."""
    ours: list[EngineRun] = []
    theirs: list[float] = []
    tokens: list[int] = []
    for number in range(repeats):
        ours.append(run_engine(engine, [prompt], length))
        if length < _LONG or number == 0:
            seconds, tokens = peft_generate(oracle, prompt, length)
            theirs.append(seconds)
    seconds = median(run.seconds for run in ours)
    row = {
        "tokens": length,
        "ours_tokens_per_second": length / seconds,
        "peft_tokens_per_second": length / median(theirs),
        "ratio": median(theirs) / seconds,
        "tokens_equal": all(run.tokens["0"] == tokens for run in ours),
        "draft_hit_rate": ours[0].draft_hit_rate,
        "forwards_per_token": ours[0].steps / length,
    }
    print_row(row)
    return row


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """What the rows must show."""
    bars = [
        Bar(f"64 + {row['tokens']} tokens: ours over PEFT", ">=", _BARS[row["tokens"]], row["ratio"])
        for row in rows
        if row["tokens"] in _BARS
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
    args = parser.parse_args()
    lookahead = not args.no_lookahead
    engine = make_engine(args.model, threads=args.threads, lookahead=lookahead)
    oracle = PeftOracle(args.model)
    prompt = prompt_tokens(args.model, args.prompt_tokens)
    run_engine(engine, [prompt], 16)
    peft_generate(oracle, prompt, 4)
    rows = [compare(engine, oracle, prompt, length, args.repeats) for length in args.lengths]
    ratio = min(rows, key=lambda row: abs(row["tokens"] - 128))["ratio"]
    result = {"benchmark": "vs_peft", "lookahead": lookahead, "threads": torch.get_num_threads(), "ratio": ratio}
    emit({**result, "rows": rows}, bars_of(rows) if args.prompt_tokens == 64 and lookahead else ())


if __name__ == "__main__":
    main()
