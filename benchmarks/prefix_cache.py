"""A second request with the same 1,000-token prefix: how soon its first token comes, and whether it says the same.

    python -m benchmarks.prefix_cache [--model DIR] [--prefix-tokens 1000] [--repeats 5] [--no-http]

    engine    in-process, to the first token
    http      at the client of a server with its default settings, through a stream

Every pair has a prefix of its own, then two different questions of 16 tokens. `ratio` is the second's time over the
first's, by medians. The second request also runs on an engine without a prefix cache: tokens and the scalings of every
position, the prompt's included, must be the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import DEMO, Bar, emit, make_engine, print_row, prompt_tokens, run_engine
from benchmarks.http_client import run, stream_generate
from tests.support.server_process import server

_QUESTION = 16
_TOKENS = 16
_ALL_SCALINGS = {"return_scalings": "full", "scalings_start": 0}
_CLOSE = 1e-5  # fp32 sums in another order


def prompts(model: Path, length: int, pair: int) -> tuple[list[int], list[int]]:
    """Two prompts with a prefix of `length` tokens in common that no other pair has."""
    prefix = prompt_tokens(model, length, seed=1000 + pair)
    first, second = (prompt_tokens(model, _QUESTION, seed=2000 + 2 * pair + i) for i in (0, 1))
    return prefix + first, prefix + second


def in_process(model: Path, length: int, repeats: int, threads: int | None) -> tuple[dict[str, Any], list[Bar]]:
    """The engine's row and bars."""
    engine = make_engine(model, prefix_cache=True, threads=threads)
    without = make_engine(model, threads=threads)
    firsts, seconds, differences, equal = [], [], [], True
    for pair in range(-1, repeats):  # the first pair warms up
        first, second = prompts(model, length, pair)
        cold = run_engine(engine, [first], _TOKENS)
        warm = run_engine(engine, [second], _TOKENS, _ALL_SCALINGS)
        expected = run_engine(without, [second], _TOKENS, _ALL_SCALINGS)
        ours, theirs = (np.frombuffer(run.scalings["0"], np.float32) for run in (warm, expected))
        equal = equal and warm.tokens == expected.tokens and len(ours) == len(theirs)
        differences.append(float(np.abs(ours - theirs).max()))
        if pair >= 0:
            firsts.append(cold.first_token_seconds)
            seconds.append(warm.first_token_seconds)
    row = times("engine", firsts, seconds) | {"tokens_equal": equal, "largest_difference": max(differences)}
    print_row(row)
    return row, [
        Bar("engine: time to first token, second request over first", "<=", 0.15, row["ratio"]),
        Bar("tokens equal to those without a cache", "==", True, equal),
        Bar("scalings, prompt included: largest difference", "<=", _CLOSE, max(differences)),
    ]


def through_http(model: Path, length: int, repeats: int, threads: int | None) -> tuple[dict[str, Any], list[Bar]]:
    """The server's row and bar. Raises RuntimeError where it did not find the prefix, or found one too many."""
    firsts, seconds = [], []
    flags = ["--model", str(model), "--dtype", "float32", *(["--threads", str(threads)] if threads else [])]
    with server(*flags) as running:
        for pair in range(-1, repeats):
            for prompt, times_of, shared in zip(
                prompts(model, length, pair), (firsts, seconds), (False, True), strict=True
            ):
                body = {"prompt": prompt, "max_tokens": _TOKENS, "temperature": 0, "ignore_eos": True}
                answer = run(stream_generate(running.port, body))
                cached = answer.usage["cached_tokens"]
                if (cached > length // 2) != shared:
                    raise RuntimeError(f"{cached} cached tokens in request {1 + shared} of a pair")
                if pair >= 0:
                    times_of.append(answer.first_token_seconds)
    row = times("http", firsts, seconds)
    print_row(row)
    return row, [Bar("http: time to first token, second request over first", "<=", 0.15, row["ratio"])]


def times(where: str, firsts: list[float], seconds: list[float]) -> dict[str, Any]:
    """Medians of both requests."""
    first, second = median(firsts), median(seconds)
    return {"where": where, "first_seconds": first, "second_seconds": second, "ratio": second / first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--prefix-tokens", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: the engine's")
    parser.add_argument("--no-http", action="store_true", help="the engine alone")
    args = parser.parse_args()
    rows, bars = [], []
    for side in [in_process] if args.no_http else [in_process, through_http]:
        row, more = side(args.model, args.prefix_tokens, args.repeats, args.threads)
        rows.append(row)
        bars += more
    emit({"benchmark": "prefix_cache", "prefix_tokens": args.prefix_tokens, "rows": rows}, bars)


if __name__ == "__main__":
    main()
