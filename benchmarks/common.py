"""What the benchmarks share: machine and versions, prompts, engines, a loop around them, bars, the last line."""

from __future__ import annotations

import json
import operator
import os
import platform
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from service.checkpoint import Checkpoint
from service.contract.options import EngineOptions
from service.contract.output import DraftCounts
from service.contract.request import Request, SamplingParams
from service.engine.engine import Engine
from service.engine.loader import build_engine, load_checkpoint_and_model, uses_native
from service.engine.speculation.costs import StepCost
from service.engine.step_cost import measure_steps
from service.model.xlora_model import XLoraModel
from service.native import library
from service.native.step import NativeStep

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "model_store" / "demo"
_NOTHING: Mapping[str, Any] = {}


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


def make_engine(model: Path, *, dtype: str = "float32", **options: Any) -> Engine:
    """An engine for a comparison: no prefix cache and no drafts copied from earlier text unless `options` ask for them.

    Raises RuntimeError where it cannot have the native kernels that its options ask for.
    """
    alone = {"prefix_cache": False, "speculative_tokens": 0, **options}
    options_of_engine = EngineOptions(str(model), dtype=dtype, **alone)
    return build(*load_checkpoint_and_model(options_of_engine), options_of_engine)


def build(model: XLoraModel, checkpoint: Checkpoint, options: EngineOptions) -> Engine:
    """An engine around a loaded model. Raises RuntimeError where it cannot have the native kernels that its options ask
    for.
    """
    engine = build_engine(model, checkpoint, options, wait_for_native=True)
    asked = uses_native(options, model.device, model.dtype)
    if asked and not isinstance(engine.runner.step, NativeStep):
        raise RuntimeError("there are no native kernels for it")
    return engine


def build_engines(
    model: XLoraModel, checkpoint: Checkpoint, options: EngineOptions, depths: Sequence[int | None]
) -> list[Engine]:
    """Engines that share one model and the step that computes it, one for each depth of drafts (0: no lookahead, None:
    the bundle's); each has a pool and a scheduler of its own.
    """
    own = [replace(options, lookahead=depth != 0, draft_depth=depth or None) for depth in depths]
    first = build(model, checkpoint, own[0])
    others = [
        build_engine(model, checkpoint, replace(one, native_kernels=False), step_cost=StepCost()) for one in own[1:]
    ]  # measured with the step that they are given: the model's tensors may be made for native kernels alone
    for engine in others:
        engine.runner.step = first.runner.step
    learn_costs(others)
    return [first, *others]


def learn_costs(engines: Iterable[Engine]) -> None:
    """Lets engines know what their steps cost: after they have been given others, or threads."""
    for engine in engines:
        measure_steps(engine, engine._scheduler)


def use_threads(count: int, engines: Iterable[Engine] = ()) -> None:
    """From now on, torch and the native kernels compute on so many threads, of which `engines` take note."""
    torch.set_num_threads(count)
    library.use_threads(count)
    learn_costs(engines)


@dataclass
class EngineRun:
    """What an engine did with some requests."""

    seconds: float
    first_token_seconds: float = 0.0  # until the first token of any of them
    tokens: dict[str, list[int]] = field(default_factory=dict)  # by request id
    scalings: dict[str, bytes] = field(default_factory=dict)  # float32 [positions, S, E], where they were asked for
    steps: int = 0
    drafts: DraftCounts = field(default_factory=DraftCounts)

    @property
    def draft_hit_rate(self) -> float:
        """Drafts of the scaling pass that were kept, of those that cost a row."""
        return self.drafts.hits / max(1, self.drafts.hits + self.drafts.misses)

    @property
    def decode_tokens_per_second(self) -> float:
        """After the first token; for runs of one request."""
        [tokens] = self.tokens.values()
        return (len(tokens) - 1) / (self.seconds - self.first_token_seconds)


def run_engine(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    request: Mapping[str, Any] = _NOTHING,
    **sampling: Any,
) -> EngineRun:
    """All prompts at once, greedy unless told otherwise, never stopping early; until the engine is idle.

    `request` are further fields of each Request.
    """
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling})
    run = EngineRun(0.0)
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        run.tokens[str(number)], run.scalings[str(number)] = [], b""
        engine.add(Request(str(number), list(prompt), params, **request))
    while engine.has_work():
        step = engine.step()
        run.steps += 1
        run.drafts.add(step.stats.drafts)
        for output in step.outputs:
            if output.tokens and not run.first_token_seconds:
                run.first_token_seconds = time.perf_counter() - started
            run.tokens[output.request_id] += [token.id for token in output.tokens]
            if output.gate is not None and output.gate.full is not None:
                run.scalings[output.request_id] += output.gate.full
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


def note(results: Path | None, row: dict[str, Any]) -> None:
    """Adds a row to a file of JSON lines, if there is one: what is there stays, however the process ends."""
    if results is not None:
        with results.open("a") as file:
            file.write(json.dumps(rounded(row)) + "\n")


@dataclass(frozen=True)
class Bar:
    """What a benchmark must show, and what it showed."""

    what: str
    sign: str  # ">=", "<=" or "=="
    limit: float | bool
    measured: float | bool

    @property
    def met(self) -> bool:
        """Whether it did."""
        return _COMPARE[self.sign](self.measured, self.limit)


_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


def print_bars(bars: Sequence[Bar]) -> None:
    """A table for a person."""
    for bar in bars:
        wanted = f"{bar.sign} {bar.limit}"
        print(f"{bar.what:<74} {wanted:>9}  {rounded(bar.measured, 3)!s:>7}  {'met' if bar.met else 'MISSED'}")


def emit(result: dict[str, Any], bars: Sequence[Bar] = ()) -> None:
    """The bars, and the last line of stdout: one JSON document."""
    print_bars(bars)
    shown = [{**asdict(bar), "met": bar.met} for bar in bars]
    print(json.dumps(rounded({**result, "bars": shown, "environment": environment()})), flush=True)
