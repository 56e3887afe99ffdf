"""Against PEFT's XLoraModel: same weights, same process, one request, greedy. Tokens are compared in the same run.

    python -m benchmarks.vs_peft [--model DIR] [--lengths 32 128 512] [--prompt-tokens 64] [--repeats 3]

`ratio` is ours over PEFT's tokens per second at 128 tokens; there is a row per length. PEFT runs its own `generate`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.common import DEMO, EngineRun, emit, print_row, prompt_tokens, run_engine
from service.engine.engine import Engine
from service.engine.loader import load_engine
from service.engine.options import EngineOptions
from tests.oracle import PeftOracle


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
    engine: Engine, oracle: PeftOracle, prompt: list[int], length: int, repeats: int
) -> dict[str, float | bool]:
    """One row: the two take turns, and the fastest of each counts (the machine may be shared)."""
    ours: list[EngineRun] = []
    theirs: list[float] = []
    tokens: list[int] = []
    for _ in range(repeats):
        ours.append(run_engine(engine, [prompt], length))
        seconds, tokens = peft_generate(oracle, prompt, length)
        theirs.append(seconds)
    best = min(ours, key=lambda run: run.seconds)
    row = {
        "tokens": length,
        "ours_tokens_per_second": length / best.seconds,
        "peft_tokens_per_second": length / min(theirs),
        "ratio": min(theirs) / best.seconds,
        "tokens_equal": all(run.tokens["0"] == tokens for run in ours),
        "draft_hit_rate": best.draft_hits / max(1, best.draft_hits + best.draft_misses),
        "forwards_per_token": best.steps / length,
    }
    print_row(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads for both sides; default: torch's own")
    parser.add_argument("--no-lookahead", action="store_true")
    args = parser.parse_args()
    lookahead = not args.no_lookahead
    engine = load_engine(EngineOptions(str(args.model), dtype="float32", threads=args.threads, lookahead=lookahead))
    oracle = PeftOracle(args.model)
    prompt = prompt_tokens(args.model, args.prompt_tokens)
    run_engine(engine, [prompt], 16)
    peft_generate(oracle, prompt, 4)
    rows = [compare(engine, oracle, prompt, length, args.repeats) for length in args.lengths]
    at_128 = min(rows, key=lambda row: abs(row["tokens"] - 128))
    emit({"benchmark": "vs_peft", "ratio": at_128["ratio"], "lookahead": lookahead, "rows": rows})


if __name__ == "__main__":
    main()
