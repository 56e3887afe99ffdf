"""How soon short requests have their first token beside a long prompt, and beside a request for 16 choices.

    python -m benchmarks.fairness [--model DIR] [--rounds 8] [--prompt-tokens 4000] [--choices 16]
                                  [--batched-tokens N]

    alone           short requests (16 prompt tokens), one after another at an idle server
    beside prompt   the same while a prompt of 4,000 tokens is computed
    beside choices  the same while one request's 16 choices are generated, at a server with as many seats
    whole prompt    what first come, first served would make a short request wait at worst: the time that the long
                    prompt takes alone until its first token
    whole choices   the same for the request of 16 choices: until its last token, alone

All through HTTP and streams, in turns. Short requests pause for a random moment between two, so that they arrive
anywhere in a step; those that arrive after the neighbour's first (last) token do not count. `prompt_slowdown` is what
the short ones cost the long prompt. Without the prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import DEMO, Bar, emit, percentiles, print_row, prompt_tokens
from benchmarks.http_client import Streamed, run, stream_generate
from tests.support.server_process import server

_SHORT_TOKENS, _SHORT_OUTPUT = 16, 4
_CHOICE_TOKENS = 64
_SHORT_ALONE = 20  # in each round
_MAX_PAUSE_SECONDS = 0.02


class Short:
    """Short requests one after another, each a prompt of its own."""

    def __init__(self, port: int, model: Path, rng: random.Random) -> None:
        self._port = port
        self._rng = rng
        self._prompts: Iterator[list[int]] = itertools.cycle(
            prompt_tokens(model, _SHORT_TOKENS, seed=number) for number in range(64)
        )

    async def times(self, more: Callable[[int], bool]) -> list[tuple[float, float]]:
        """(when it was asked for, seconds to its first token), as long as `more` of so many is wanted."""
        found: list[tuple[float, float]] = []
        while more(len(found)):
            await asyncio.sleep(self._rng.uniform(0.0, _MAX_PAUSE_SECONDS))
            body = {"prompt": next(self._prompts), "max_tokens": _SHORT_OUTPUT, "temperature": 0, "ignore_eos": True}
            answer = await stream_generate(self._port, body)
            found.append((answer.started, answer.first_token_seconds))
        return found

    async def alone(self) -> list[float]:
        return [seconds for _, seconds in await self.times(lambda count: count < _SHORT_ALONE)]

    async def beside(self, body: dict[str, Any], last: bool) -> tuple[list[float], float]:
        """Seconds to the first token of those that came before the neighbour's first token (or `last`), and the
        neighbour's own seconds to that.
        """
        neighbour = asyncio.create_task(stream_generate(self._port, body))
        times = await self.times(lambda _: not neighbour.done())
        own = until(await neighbour, last)
        end = neighbour.result().started + own
        return [seconds for started, seconds in times if started < end], own


def until(answer: Streamed, last: bool) -> float:
    """Seconds to its last token or its first."""
    return answer.token_times[-1 if last else 0] - answer.started


def rows_of(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One for each kind."""
    return [
        {"kind": kind, "requests": len(seconds), **percentiles(seconds, (50, 95)), "worst": max(seconds)}
        for kind, seconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--choices", type=int, default=16)
    parser.add_argument("--batched-tokens", type=int, help="rows in one step of the server; default: its own")
    args = parser.parse_args()
    rng = random.Random(0)
    times: dict[str, list[float]] = {
        kind: [] for kind in ("alone", "beside prompt", "beside choices", "whole prompt", "whole choices")
    }
    slowed: list[float] = []
    greedy = {"temperature": 0, "ignore_eos": True}
    flags = ["--model", str(args.model), "--no-prefix-cache", "--max-num-seqs", str(args.choices)]
    flags += ["--max-num-batched-tokens", str(args.batched_tokens)] if args.batched_tokens else []
    with server(*flags) as running:
        short = Short(running.port, args.model, rng)
        for number in range(-1, args.rounds):
            long = {
                "prompt": prompt_tokens(args.model, args.prompt_tokens, seed=1000 + number),
                "max_tokens": 1,
                **greedy,
            }
            many = {"prompt": prompt_tokens(args.model, 64, seed=2000 + number), "n": args.choices, "seed": number + 1}
            many |= {"max_tokens": _CHOICE_TOKENS, "ignore_eos": True}
            turns: list[Callable[[], Any]] = [
                lambda: times["alone"].extend(run(short.alone())),
                partial(measure_beside, short, long, False, times["beside prompt"], slowed),
                partial(measure_beside, short, many, True, times["beside choices"], []),
                partial(measure_alone, running.port, long, False, times["whole prompt"]),
                partial(measure_alone, running.port, many, True, times["whole choices"]),
            ]
            rng.shuffle(turns)
            for turn in turns:
                turn()
            if number < 0:  # warm-up
                for kept in (*times.values(), slowed):
                    kept.clear()
    rows = rows_of(times)
    for row in rows:
        print_row(row)
    emit({"benchmark": "fairness", "rows": rows, "prompt_slowdown": median(slowed) / median(times["whole prompt"])},
         bars_of(times))  # fmt: skip


def measure_beside(short: Short, body: dict[str, Any], last: bool, times: list[float], own: list[float]) -> None:
    """Short ones beside a neighbour."""
    seconds, neighbour = run(short.beside(body, last))
    times += seconds
    own.append(neighbour)


def measure_alone(port: int, body: dict[str, Any], last: bool, times: list[float]) -> None:
    """The neighbour alone."""
    times.append(until(run(stream_generate(port, body)), last))


def bars_of(times: dict[str, list[float]]) -> list[Bar]:
    """What the times must show."""
    whole, choices, alone = (median(times[kind]) for kind in ("whole prompt", "whole choices", "alone"))
    prompt, beside = times["beside prompt"], times["beside choices"]
    return [
        Bar("median beside a long prompt, over that prompt's whole time", "<=", 0.5, median(prompt) / whole),
        Bar("worst beside a long prompt, over that prompt's whole time", "<=", 0.9, max(prompt) / whole),
        Bar("median beside 16 choices, over the median alone", "<=", 5.0, median(beside) / alone),
        Bar("worst beside 16 choices, over the choices' whole time", "<=", 0.25, max(beside) / choices),
    ]


if __name__ == "__main__":
    main()
