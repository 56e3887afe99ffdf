"""What the benchmarks share: where and with what they ran, prompts, an engine loop, percentiles, the last line."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from service.engine.engine import Engine
from service.engine.request import Request, SamplingParams

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "model_store" / "demo"


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def prompt_tokens(model: Path, length: int, seed: int = 0) -> list[int]:
    """Token ids to start from: questions and answers of the bundle's examples.json in a seeded order, cut to `length`.

    What a prompt says decides how often drafts hit. A bundle without examples gets random ids.
    """
    tokenizer = Tokenizer.from_file(str(model / "base" / "tokenizer.json"))
    generator = random.Random(seed)
    examples = model / "examples.json"
    if not examples.exists():
        return [generator.randrange(16, tokenizer.get_vocab_size()) for _ in range(length)]
    texts = [example["prompt"] + example["answer"] + "\n" for example in json.loads(examples.read_text())]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += tokenizer.encode(generator.choice(texts), add_special_tokens=not tokens).ids
    return tokens[:length]


@dataclass
class EngineRun:
    """What an engine did with some requests."""

    seconds: float
    tokens: dict[str, list[int]] = field(default_factory=dict)  # by request id
    steps: int = 0
    draft_hits: int = 0
    draft_misses: int = 0


def run_engine(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> EngineRun:
    """All prompts at once, greedy unless told otherwise, never stopping early; until the engine is idle."""
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling})
    run = EngineRun(0.0)
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        run.tokens[str(number)] = []
        engine.add(Request(str(number), list(prompt), params))
    while engine.has_work():
        step = engine.step()
        run.steps += 1
        run.draft_hits += step.stats.draft_hits
        run.draft_misses += step.stats.draft_misses
        for output in step.outputs:
            run.tokens[output.request_id] += [token.id for token in output.tokens]
    run.seconds = time.perf_counter() - started
    return run


def percentiles(values: Sequence[float], points: Sequence[int] = (50, 95, 99)) -> dict[str, float]:
    """{"p50": ..., ...} by linear interpolation."""
    if len(values) < 2:
        return {f"p{point}": values[0] if values else float("nan") for point in points}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{point}": cuts[point - 1] for point in points}


def rounded(value: Any, digits: int = 4) -> Any:
    """Floats rounded to `digits` significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return value


def print_row(row: dict[str, Any]) -> None:
    """One row for a person."""
    print("  ".join(f"{name} {rounded(value)}" for name, value in row.items()), flush=True)


def emit(result: dict[str, Any]) -> None:
    """The last line of stdout: one JSON document."""
    print(json.dumps(rounded({**result, "environment": environment()})))
