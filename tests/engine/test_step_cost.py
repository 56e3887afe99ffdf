"""What steps cost is measured by an engine that then serves as if it had just been made."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest

from service.contract.options import EngineOptions
from service.contract.output import GateStats
from service.engine import step_cost
from service.engine.engine import Engine
from service.engine.loader import build_engine, rows_to_capture
from service.engine.speculation.costs import StepCost
from service.model.batch import Batch
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput
from service.model.xlora_model import XLoraModel
from tests.support.driver import Engines


def build(engines: Engines, *, block_size: int = 4, blocks: int = 64, **options: object) -> Engine:
    """An engine that measures its steps."""
    memory = blocks * engines.model.kv_layout(block_size).block_bytes
    settings = {"max_model_len": 64, "max_num_seqs": 4, "native_kernels": False, **options}
    chosen = EngineOptions(str(engines.tiny.path), block_size=block_size, kv_memory_bytes=memory, **settings)  # type: ignore[arg-type]
    return build_engine(engines.model, engines.checkpoint, chosen)


@pytest.mark.parametrize("seconds", [0.9, 60.0], ids=["cut short", "to its end"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_model_len": 2, "blocks": 2},
        {"max_model_len": 1, "block_size": 1, "blocks": 2},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"lookahead": False, "prefix_cache": False},
    ],
    ids=str,
)
def test_leaves_nothing_behind(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, seconds: float, options: dict[str, int]
) -> None:
    """No block, no number for the metrics, and the bundle's word on its drafts: none of a text that nobody sent."""
    clock = itertools.count()
    monkeypatch.setattr(step_cost, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 10))
    monkeypatch.setattr(step_cost, "_MAX_SECONDS", seconds)
    monkeypatch.setattr(step_cost, "_MAX_ROUNDS", 2)
    engine = build(engines, **options)
    scheduler = engine._scheduler
    assert scheduler.drafts.cost != StepCost()
    assert [rows for rows, _ in scheduler.drafts.cost.points][:5] == [1, 2, 4, 6, 8], "however slow a forward is"
    assert all(math.isfinite(cost) for _, cost in scheduler.drafts.cost.points)
    assert [record.rate for record in scheduler.drafts.records] == scheduler.drafts.rates
    assert (scheduler.drafts.lookahead, scheduler.drafts.speculative_tokens) == (options.get("lookahead", True), 8)
    assert engine.report().stats.gate == GateStats()
    assert not engine.has_work()
    assert engine.blocks.used == 0
    engine.check_integrity()


def test_a_step_that_is_handed_over_meanwhile_is_measured(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its costs, and not those of the one before, whenever it comes."""

    class Other:
        def __init__(self, model: XLoraModel) -> None:
            self.draft = model.draft
            self._forward = model.forward

        def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
            return self._forward(batch, kv_cache)

    other = Other(engines.model)
    timed: list[object] = []
    add, time_forward = Engine.add, step_cost.time_forward

    def add_and_hand_over(self: Engine, request: object) -> None:
        add(self, request)  # type: ignore[arg-type]
        if not timed[1:]:
            self.runner.hand_over(other)

    def noted(step: object, *args: object, **kwargs: object) -> object:
        timed.append(step)
        return time_forward(step, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(step_cost, "_MAX_SECONDS", 0.0)
    monkeypatch.setattr(Engine, "add", add_and_hand_over)
    monkeypatch.setattr(step_cost, "time_forward", noted)
    engine = build(engines)
    assert engine.runner.step is other
    assert timed[-1] is other


@pytest.mark.parametrize(("slots", "depth"), [(1, 1), (1, 4), (4, 1), (64, 4), (512, 8)])
def test_the_rows_that_are_timed_are_captured(slots: int, depth: int) -> None:
    """A graph for few rows against the eager model for many would make every draft seem too expensive."""
    assert rows_to_capture(slots, depth) >= max(step_cost.MANY_ROWS, 2 * slots)
