"""Measures the cost of a step on this machine, by which the scheduler decides how many drafts pay.

The forward is timed alone, with few rows and with many; the host's part is the time that whole steps of the engine take
beyond it. The fastest of several rounds counts, because other load on the machine only adds time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch

from service.contract.request import Request, SamplingParams
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.engine.speculation.costs import StepCost
from service.model.kv_cache import KVCache
from service.model.steps.step import Step
from service.model.steps.warm_up import draft_idly, idle_batch

logger = logging.getLogger(__name__)

_ROWS = (1, 2, 8, 4, 6, 16, 32)  # sizes to time, the most informative ones first
MANY_ROWS = max(_ROWS)
_MIN_SIZES = 5  # sizes that are timed however long a forward takes: what one sequence's drafts have rows for
_MAX_ROUNDS = 40
_MAX_SECONDS = 0.6  # after which no more is timed
_MAX_STEPS = 24  # of the engine


def measure_steps(engine: Engine, scheduler: Scheduler) -> None:
    """Measures an idle engine's steps, with a request of its own, and sets the scheduler's step cost. The forward is
    measured again when the runner gets another Step.
    """
    runner, depth = engine.runner, len(scheduler.drafts.rates)
    while True:  # until no other step has been handed over meanwhile
        step = runner.step
        forward = time_forward(step, runner.kv_cache, depth=depth)
        host = max(0.0, _time_steps(engine, scheduler) - forward.seconds(1))
        if runner.step is step:
            break

    def measured(cost: StepCost) -> None:
        points = tuple((rows, seconds + host) for rows, seconds in cost.points)
        scheduler.drafts.cost = StepCost(points, cost.layer)
        table = ", ".join(f"{rows}: {1e3 * seconds:.2f}" for rows, seconds in points)
        logger.info("milliseconds of a step by its rows: %s; of the draft layer: %.2f", table, 1e3 * cost.layer)

    measured(forward)
    runner.on_other_step = lambda: measured(time_forward(runner.step, runner.kv_cache, depth=depth))


def _time_steps(engine: Engine, scheduler: Scheduler) -> float:
    """Seconds of the engine's fastest step with one row. Drafting is off meanwhile, so that this made-up
    text does not count in acceptance rates, and no step waits for the draft layer.
    """
    drafting = scheduler.drafts.lookahead, scheduler.drafts.speculative_tokens
    scheduler.drafts.lookahead, scheduler.drafts.speculative_tokens = False, 0
    max_tokens = min(_MAX_STEPS, engine.info.max_model_len - 1)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(Request("first steps", [0], sampling, cache_salt="first steps"))
    best, begun = float("inf"), time.perf_counter()
    while engine.has_work():
        started = time.perf_counter()
        stats = engine.step().stats
        now = time.perf_counter()
        if stats.scaling_rows + stats.real_rows == 1:
            best = min(best, now - started)
        if now - begun > _MAX_SECONDS and best < float("inf"):
            engine.abort("first steps")
    engine.report()  # discards the statistics of the aborted request
    scheduler.drafts.lookahead, scheduler.drafts.speculative_tokens = drafting
    return best


def time_forward(step: Step, kv_cache: KVCache, *, depth: int) -> StepCost:
    """Times forwards, and the draft layer if `depth` is over 1. Writes to the scratch block only; nothing else may use
    the model at the same time.
    """
    hidden = step.forward(idle_batch(kv_cache, 2), kv_cache).hidden[:1].clone()
    works: list[Callable[[], object]] = [partial(step.forward, idle_batch(kv_cache, rows), kv_cache) for rows in _ROWS]
    if depth > 1:
        works.insert(0, partial(draft_idly, step, kv_cache, hidden, depth))
    best = _fastest(works, hidden.device, min_works=_MIN_SIZES + (depth > 1))
    layer = best.pop(0) / (depth - 1) if depth > 1 else 0.0
    seconds = accumulate((seconds for _, seconds in sorted(zip(_ROWS, best, strict=False))), max)
    return StepCost(tuple(zip(sorted(_ROWS[: len(best)]), seconds, strict=True)), layer)


def _fastest(works: list[Callable[[], object]], device: torch.device, *, min_works: int) -> list[float]:
    """The shortest time of each work in seconds, over rounds that run all of them in turn: of the first `min_works`,
    and of others while there is time.
    """
    best: list[float] = []
    started = time.perf_counter()
    for number, work in enumerate(works):
        if number >= min_works and time.perf_counter() - started > _MAX_SECONDS:
            break
        best.append(_seconds(work, device))
    for _ in range(_MAX_ROUNDS - 1):
        if time.perf_counter() - started > _MAX_SECONDS:
            break
        best = [min(seconds, _seconds(work, device)) for seconds, work in zip(best, works, strict=False)]
    return best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
