"""Measures the cost of a step on this machine, by which the scheduler decides how many drafts pay.

    seconds of a step  =  host + fixed + per_row * rows + per_layer * runs of the draft layer

The forward is timed alone, with few rows and with many; the host's part is the time that whole steps of the engine take
beyond it. The fastest of several rounds counts, because other load on the machine only adds time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from service.contract.request import Request, SamplingParams
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.engine.speculation.drafters import StepCost
from service.model.kv_cache import KVCache
from service.model.steps.step import Step
from service.model.steps.warm_up import draft_idly, idle_batch

logger = logging.getLogger(__name__)

_FEW, _MANY = 2, 16  # rows: about those of one sequence without drafts, and with many
_MIN_ROUNDS, _MAX_ROUNDS = 2, 40
_MAX_SECONDS = 0.3  # of each measurement, once it has its minimum of rounds
_MAX_STEPS = 24  # of the engine
_MIN_ROW, _MAX_ROW, _MAX_LAYER = 0.001, 0.5, 1.0  # plausible costs: a measurement beyond them was disturbed


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Measured seconds of a step's forward."""

    few: float  # a forward of _FEW rows
    row: float  # each further row
    layer: float  # one run of the draft layer, with the head

    def cost(self, host: float) -> StepCost:
        """The costs relative to a step without rows, where the host takes `host` seconds per step."""
        fixed = host + max(self.few - _FEW * self.row, self.few / 2)
        row = min(max(self.row / fixed, _MIN_ROW), _MAX_ROW)
        return StepCost(row, min(self.layer / fixed, _MAX_LAYER))


def measure_steps(engine: Engine, scheduler: Scheduler) -> None:
    """Measures an idle engine's steps, with a request of its own, and sets the scheduler's step cost. The forward is
    measured again when the runner gets another Step.
    """
    runner, drafts = engine.runner, len(scheduler.draft_rates) > 1
    forward = time_forward(runner.step, runner.kv_cache, drafts=drafts)
    host = max(0.0, _time_steps(engine) - forward.few)

    def measured(seconds: StepSeconds) -> None:
        scheduler.step_cost = cost = seconds.cost(host)
        logger.info("a row costs %.3f of a step, a run of the draft layer %.3f", cost.row, cost.layer)

    measured(forward)
    runner.on_other_step = lambda: measured(time_forward(runner.step, runner.kv_cache, drafts=drafts))


def _time_steps(engine: Engine) -> float:
    """Seconds of the engine's fastest step with at most _FEW rows."""
    max_tokens = min(_MAX_STEPS, engine.info.max_model_len - 1)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(Request("first steps", [0], sampling, cache_salt="first steps"))
    best, begun = float("inf"), time.perf_counter()
    while engine.has_work():
        started = time.perf_counter()
        stats = engine.step().stats
        now = time.perf_counter()
        if 0 < stats.scaling_rows + stats.real_rows <= _FEW:
            best = min(best, now - started)
        if now - begun > _MAX_SECONDS and best < float("inf"):
            engine.abort("first steps")
    return best


def time_forward(step: Step, kv_cache: KVCache, *, drafts: bool) -> StepSeconds:
    """Times forwards, and the draft layer if `drafts`. Writes to the scratch block only; nothing else may use the model
    at the same time.
    """
    few, many = (idle_batch(kv_cache, rows) for rows in (_FEW, _MANY))
    hidden = step.forward(few, kv_cache).hidden[:1].clone()
    works: list[Callable[[], object]] = [lambda: step.forward(few, kv_cache), lambda: step.forward(many, kv_cache)]
    if drafts:
        works.append(lambda: draft_idly(step, kv_cache, hidden))
    best = fastest(works, hidden.device)
    return StepSeconds(best[0], max(0.0, best[1] - best[0]) / (_MANY - _FEW), best[2] if drafts else 0.0)


def fastest(works: list[Callable[[], object]], device: torch.device) -> list[float]:
    """The shortest time of each work in seconds, over rounds that run all of them in turn."""
    best = [float("inf")] * len(works)
    started = time.perf_counter()
    for number in range(_MAX_ROUNDS):
        best = [min(seconds, _seconds(work, device)) for seconds, work in zip(best, works, strict=True)]
        if number + 1 >= _MIN_ROUNDS and time.perf_counter() - started > _MAX_SECONDS:
            break
    return best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
