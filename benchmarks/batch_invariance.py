"""Does a request's text depend on its neighbours? Alone against amid strangers, fp32 and bf16, greedy and sampled.

    python -m benchmarks.batch_invariance [--model DIR] [--requests 16] [--tokens 64]

Sums are made in another order when the batch has another shape. In fp32 that moves logits by about 1e-6; in bf16 by
about 1e-2, enough to flip a token now and then. `same` counts whole requests, `prefix` the share of tokens before the
first difference. Drafts are on, the prefix cache is off: what ran alone must not be found again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, Bar, emit, make_engine, print_row, prompt_tokens, run_engine
from service.engine.engine import Engine


def compare(engine: Engine, prompts: list[list[int]], dtype: str, temperature: float, tokens: int) -> dict[str, Any]:
    """One row: every request alone, then all at once."""
    sampling = {"temperature": temperature, "seed": 7}
    alone = [run_engine(engine, [prompt], tokens, **sampling).tokens["0"] for prompt in prompts]
    together = run_engine(engine, prompts, tokens, **sampling).tokens
    agreeing = [common_prefix(tokens, together[str(number)]) for number, tokens in enumerate(alone)]
    row = {
        "dtype": dtype,
        "temperature": temperature,
        "requests": len(prompts),
        "same": sum(length == tokens for length in agreeing),
        "prefix": sum(agreeing) / (len(prompts) * tokens),
    }
    print_row(row)
    return row


def common_prefix(left: list[int], right: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: the engine's")
    args = parser.parse_args()
    prompts = [prompt_tokens(args.model, 8 + 5 * number, seed=number) for number in range(args.requests)]
    rows = []
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(args.model, dtype=dtype, threads=args.threads, speculative_tokens=8)
        rows += [compare(engine, prompts, dtype, temperature, args.tokens) for temperature in (0.0, 1.0)]
    same = all(row["same"] == row["requests"] for row in rows if row["dtype"] == "float32")
    emit({"benchmark": "batch_invariance", "rows": rows}, [Bar("float32: all requests as alone", "==", True, same)])


if __name__ == "__main__":
    main()
