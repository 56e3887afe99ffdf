"""What a step costs on this machine: of that depends how many drafts are worth their rows."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from service.engine.speculation.drafters import StepCost
from service.model.kv_cache import KVCache
from service.model.steps.step import Step
from service.model.steps.warm_up import draft_idly, idle_batch

_FEW, _MANY = 2, 16  # rows: about what one sequence has without drafts, and with many
_ROUNDS = 5
_SECONDS = 0.5  # after which there is no further round
_MIN_SHARE = 0.001  # of the fixed cost: a row that seems to cost nothing was measured badly


def measure_cost(step: Step, kv_cache: KVCache, *, drafts: bool) -> StepCost:
    """Times forwards of few and of many rows, and the draft layer if it `drafts`; the fastest of some rounds counts.

    It writes to the scratch block alone, but uses the model: nobody else may run it at the same time.
    """
    few, many = (idle_batch(kv_cache, rows) for rows in (_FEW, _MANY))
    hidden = step.forward(few, kv_cache).hidden[:1].clone()
    works: list[Callable[[], object]] = [lambda: step.forward(few, kv_cache), lambda: step.forward(many, kv_cache)]
    if drafts:
        works.append(lambda: draft_idly(step, kv_cache, hidden))
    best = [float("inf")] * len(works)
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        best = [min(seconds, _seconds(work, hidden.device)) for seconds, work in zip(best, works, strict=True)]
        if time.perf_counter() - started > _SECONDS:
            break
    row = max(0.0, best[1] - best[0]) / (_MANY - _FEW)
    fixed = max(best[0] - _FEW * row, best[0] / 2)
    return StepCost(max(_MIN_SHARE, row / fixed), best[2] / fixed if drafts else 0.0)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
