"""XLora.generate against the steps of the engine alone, over the same prompts.

    python -m benchmarks.in_process [--model DIR] [--prompts 1000] [--tokens 40] [--repeats 3]

    rate    tokens/s of XLora.generate (texts in, texts out) over those of Engine.step in a loop (ids in, ids out)
    full    tokens/s of XLora.generate with full scalings over those without

The engine alone is in a process of its own, as XLora's is, and takes turns with it; the fastest of each counts. Both
are made of the same settings, find no prompt in a prefix cache, and compute on all cores but one, without the thread
that otherwise helps on the last one: it is XLora's for texts and answers, and stands idle beside the engine alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, Bar, build, emit, print_row, prompt_tokens, run_engine
from service import XLora
from service.api.state import engine_options
from service.engine.loader import load_checkpoint_and_model
from service.engine.threads import default_threads
from service.settings import load_settings


def bare(connection: Connection, settings: dict[str, Any], tokens: int) -> None:
    """The engine alone: answers lists of prompts with seconds, until there are no more."""
    options = engine_options(load_settings(settings))
    engine = build(*load_checkpoint_and_model(options), options)
    connection.send(None)
    while (prompts := connection.recv()) is not None:
        connection.send(run_engine(engine, prompts, tokens).seconds)


def in_process(model: XLora, texts: list[str], tokens: int, **fields: Any) -> float:
    """Seconds of XLora.generate until the last answer. Raises RuntimeError where an answer is short."""
    started = time.perf_counter()
    for answer in model.generate(texts, max_tokens=tokens, temperature=0, ignore_eos=True, **fields):
        if len(answer.token_ids) != tokens:
            raise RuntimeError(f"{len(answer.token_ids)} tokens, and not {tokens}")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    settings = {"dtype": "float32", "prefix_cache": False, "threads": default_threads()}
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    alone = multiprocessing.get_context("spawn").Process(
        target=bare, args=(theirs, {"model": str(options.model), **settings}, options.tokens), daemon=True
    )
    alone.start()
    ours.recv()
    best: dict[str, float] = {}
    with XLora(str(options.model), progress=False, **settings) as model:
        ids = [prompt_tokens(options.model, 20 + number % 40, number) for number in range(options.prompts)]
        texts = [model.tokenizer.decode(one) for one in ids]
        ids = [model.tokenizer.encode(text) for text in texts]
        in_process(model, texts[:64], options.tokens)  # warm
        for _ in range(options.repeats):
            ours.send(ids)
            found = {
                "engine": ours.recv(),
                "none": in_process(model, texts, options.tokens),
                "mean": in_process(model, texts, options.tokens, scalings="mean"),
                "full": in_process(model, texts, options.tokens, scalings="full"),
            }
            rates = {name: options.prompts * options.tokens / seconds for name, seconds in found.items()}
            print_row(rates)
            best = {name: max(rate, best.get(name, 0.0)) for name, rate in rates.items()}
    ours.send(None)
    alone.join()
    emit(
        {"benchmark": "in_process", "prompts": options.prompts, "tokens": options.tokens, "tokens_per_second": best},
        [
            Bar("XLora.generate over the engine's own rate", ">=", 0.9, best["none"] / best["engine"]),
            Bar("the same with full scalings over that without", ">=", 0.8, best["full"] / best["none"]),
        ],
    )


if __name__ == "__main__":
    main()
