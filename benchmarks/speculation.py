"""Text that repeats itself: drafts of several tokens copied from earlier text, on against off. One request, greedy.

    python -m benchmarks.speculation [--model DIR] [--repeats 3]

Each prompt is two worked examples of the demo and then the first question again, so that the answer is to be copied;
generation ends with the answer. Two domains, every example once, all answers of a domain added up. The rows of
plain text, where nothing is to be copied, show what drafting costs there. Tokens must be the same with and without.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.common import DEMO, Bar, EngineRun, emit, make_engine, print_row, run_engine
from service.engine.engine import Engine

_COPIED = ("math", "code")
_MAX_TOKENS = 96


def prompts(model: Path, domain: str, *, repeated: bool) -> list[list[int]]:
    """Two worked examples and a question: the first one's, or that of a third example."""
    tokenizer = Tokenizer.from_file(str(model / "base" / "tokenizer.json"))
    examples = [one for one in json.loads((model / "examples.json").read_text()) if one["domain"] == domain]
    texts = [one["prompt"] + one["answer"] + "\n" for one in examples]
    count = len(examples)
    asked = [examples[i if repeated else (i + 2) % count]["prompt"] for i in range(count)]
    return [tokenizer.encode(texts[i] + texts[(i + 1) % count] + asked[i]).ids for i in range(count)]


def compare(engines: dict[bool, Engine], text: str, inputs: list[list[int]], repeats: int) -> dict[str, Any]:
    """One row: every prompt by itself, with and without drafts in turns; medians of the whole round count."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    runs: dict[bool, list[EngineRun]] = {}
    for _ in range(repeats):
        for drafting, engine in engines.items():
            runs[drafting] = [run_engine(engine, [prompt], _MAX_TOKENS, ignore_eos=False) for prompt in inputs]
            seconds[drafting].append(sum(run.seconds for run in runs[drafting]))
    tokens = {drafting: sum(len(run.tokens["0"]) for run in own) for drafting, own in runs.items()}
    steps = {drafting: sum(run.steps for run in own) for drafting, own in runs.items()}
    row = {
        "text": text,
        "tokens": tokens[True],
        "forwards_per_token": steps[True] / tokens[True],
        "without": steps[False] / tokens[False],
        "tokens_per_second": tokens[True] / median(seconds[True]),
        "speedup": median(seconds[False]) / median(seconds[True]),
        "tokens_equal": [run.tokens for run in runs[True]] == [run.tokens for run in runs[False]],
    }
    print_row(row)
    return row


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """What the rows must show."""
    copied = [row for row in rows if row["text"].startswith("copied")]
    forwards = sum(row["forwards_per_token"] * row["tokens"] for row in copied) / sum(row["tokens"] for row in copied)
    return [
        Bar("copied text: forwards per token, prefill included", "<=", 1.0, forwards),
        Bar("tokens equal with and without drafts", "==", True, all(row["tokens_equal"] for row in rows)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: the engine's")
    args = parser.parse_args()
    engines = {bool(count): make_engine(args.model, threads=args.threads, speculative_tokens=count) for count in (8, 0)}
    rows = []
    for repeated in (True, False):
        for domain in _COPIED:
            text = f"{'copied' if repeated else 'plain'} {domain}"
            rows.append(compare(engines, text, prompts(args.model, domain, repeated=repeated), args.repeats))
    emit({"benchmark": "speculation", "threads": torch.get_num_threads(), "rows": rows}, bars_of(rows))


if __name__ == "__main__":
    main()
