"""One request alone, in the engine: decode tokens per second, to be run in turns with another tree's.

    python -m benchmarks.one_request [--large] [--repeats 20]

`--large` is a random model of 246 million parameters stored in bfloat16, on two threads, in place of the demo.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.common import DEMO, emit, make_engine, print_row, prompt_tokens, run_engine
from benchmarks.vs_base import large_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model, length, tokens = DEMO, 64, 128
        options = {}
        if args.large:
            model = large_bundle(Path(work) / "large", hidden=1024, layers=16, stored="bfloat16")
            length, tokens = 32, 32
            options = {"max_model_len": 512, "threads": 2}
        engine = make_engine(model, **options)
        prompt = prompt_tokens(model, length)
        rates = [run_engine(engine, [prompt], tokens).decode_tokens_per_second for _ in range(args.repeats)]
    row = {"large": args.large, "tokens_per_second": median(rates), "best": max(rates)}
    print_row(row)
    emit({"benchmark": "one_request", "rows": [row]})


if __name__ == "__main__":
    main()
