"""Steps in static buffers against the eager model, without CUDA: to capture is then to call the step again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.request import Request
from service.engine.engine import Engine
from service.model.steps.buckets import buckets
from service.model.steps.cuda_graph import Capture, CapturedSteps, Output
from service.model.steps.step import ForwardOutput
from tests.engine.gate.test_gate_settings import run_mixed
from tests.support.driver import Engines, Run, greedy, run, sampled, words
from tests.support.tiny import Tiny

VARIANTS: dict[str, dict[str, Any]] = {
    "as stored": {},
    "experts in the scaling pass, one row for all sites": {"scaling_pass_value": 0.25, "layerwise_scalings": False},
}


class CallAgain:
    """Stands for a CUDA graph: fixed shapes, fixed addresses in and out; counts captures and replays."""

    def __init__(self) -> None:
        self.captures: list[tuple[int, ...]] = []
        self.replays = 0
        self.draft_replays = 0

    def __call__(self, work: Callable[[], Output], /) -> Callable[[], Output]:
        output = work()
        if isinstance(output, ForwardOutput):
            self.captures.append(tuple(output.logits.shape))

        def replay() -> Output:
            new = work()
            if isinstance(output, ForwardOutput):
                self.replays += 1
                for field in fields(output):
                    getattr(output, field.name).copy_(getattr(new, field.name))
            else:
                assert isinstance(output, torch.Tensor)
                self.draft_replays += 1
                output.copy_(new)  # type: ignore[call-overload]
            return output

        return replay


def with_captured_steps(engine: Engine, capture: Capture, max_rows: int = 16) -> CapturedSteps:
    runner, depth = engine.runner, len(engine._scheduler.drafts.rates)
    steps = CapturedSteps(
        runner.model, runner.kv_cache, capture, max_rows=max_rows, max_model_len=256, max_num_seqs=8, draft_depth=depth
    )
    runner.step = steps
    return steps


def requests(count: int) -> list[Request]:
    """Mixed contexts: 2 to 87 tokens of prompt."""
    return [
        replace((greedy if i % 2 else sampled)(f"r{i}", words(i, 2 + 5 * i), 16 + i), return_scalings="full")
        for i in range(count)
    ]


def assert_same(ours: Run, expected: Run) -> None:
    assert ours.choices.keys() == expected.choices.keys()
    for key, choice in expected.choices.items():
        assert ours[key].tokens == choice.tokens
        assert ours[key].drafts == choice.drafts
        np.testing.assert_allclose(ours[key].full, choice.full, atol=1e-5)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def variant_engines(request: pytest.FixtureRequest, tiny: Tiny) -> Engines:
    return Engines(tiny.variant(**request.param) if request.param else tiny.as_stored())


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 17])
def test_equals_eager(variant_engines: Engines, lookahead: bool, count: int) -> None:
    """Idle rows that write into a live slot, a stale row or table, a bucket too small, prompts that share a step with
    decode rows, and steps that are too large.
    """
    expected = run(variant_engines.build(lookahead=lookahead), requests(count))
    engine = variant_engines.build(lookahead=lookahead)
    capture = CallAgain()
    steps = with_captured_steps(engine, capture)
    assert_same(run(engine, requests(count)), expected)
    assert capture.replays > 10, "the captured steps were not used"
    assert {shape[0] for shape in capture.captures} <= set(steps.row_buckets)
    assert len(steps.captured) == len(capture.captures) == len(set(steps.captured)), "captured twice"


def test_a_prompt_small_enough_is_captured(engines: Engines, lookahead: bool) -> None:
    """A segment of several rows is run as several rows with one table: chunked prefill included."""
    prompt = [replace(greedy("r", words(3, 41), 8), return_scalings="full", scalings_start=0)]
    expected = run(engines.build(lookahead=lookahead), prompt)
    engine = engines.build(lookahead=lookahead, max_num_batched_tokens=16)
    capture = CallAgain()
    with_captured_steps(engine, capture)
    ours = run(engine, prompt)
    assert_same(ours, expected)
    assert capture.replays == len(ours.steps), "a step was run eagerly"


def test_gate_settings_of_single_requests(engines: Engines) -> None:
    """Other dummy rows and global weights than the checkpoint's: a captured step reads them where it always reads."""
    expected = run_mixed(engines.build())
    engine = engines.build()
    capture = CallAgain()
    with_captured_steps(engine, capture)
    assert_same(run_mixed(engine), expected)
    assert capture.replays > 10, "the captured steps were not used"


def test_contexts_cross_buckets(engines: Engines) -> None:
    """The table grows from one bucket of width to the next while a request is under way."""
    mixed = [greedy("long", words(1, 20), 100), greedy("short", words(2, 3), 60)]
    mixed = [replace(request, return_scalings="full") for request in mixed]
    expected = run(engines.build(), mixed)
    engine = engines.build()
    steps = with_captured_steps(engine, CallAgain())
    steps.width_buckets[:] = [4, 16, 64]
    assert_same(run(engine, mixed), expected)
    assert {width for _, width in steps.captured} == {16, 64}


def test_warm_up_leaves_nothing_to_capture(engines: Engines) -> None:
    """And it writes nowhere but into the scratch slot."""
    engine = engines.build()
    capture = CallAgain()
    steps = with_captured_steps(engine, capture, max_rows=6)
    cache = engine.runner.kv_cache
    before = [pool.clone() for pool in (*cache.keys, *cache.values, cache.gate_rows)]
    steps.warm_up()
    assert [rows for rows, _ in steps.captured] == steps.row_buckets == [1, 2, 4, 6]
    for pool, old in zip((*cache.keys, *cache.values), before, strict=False):
        assert torch.equal(pool[:-1], old[:-1])
    slots = torch.arange(len(cache.gate_rows)) != cache.scratch_slot
    assert torch.equal(cache.gate_rows[slots], before[-1][slots])
    run(engine, requests(3))
    assert len(capture.captures) == 4


def test_graphs_share_the_memory_of_their_logits(engines: Engines) -> None:
    """A vocabulary of 150,000 tokens takes 77 MB of each graph of 256 rows."""
    engine, kept = engines.build(), set()

    class Noting(CallAgain):
        def __call__(self, work: Callable[[], Output], /) -> Callable[[], Output]:
            def noting() -> Output:
                output = work()
                assert isinstance(output, ForwardOutput)
                kept.add(output.logits.untyped_storage().data_ptr())
                return output

            return super().__call__(noting)

    steps = with_captured_steps(engine, Noting(), max_rows=6)
    steps.warm_up()
    run(engine, requests(3))
    assert len(steps.captured) >= 4
    assert len(kept) == 1


def test_failure_to_capture_is_logged_once(engines: Engines, caplog: pytest.LogCaptureFixture) -> None:
    """Out of memory, say: the engine serves eagerly."""

    def fail(work: Callable[[], Output], /) -> Callable[[], Output]:
        raise RuntimeError("out of memory")

    expected = run(engines.build(), requests(2))
    engine = engines.build()
    with_captured_steps(engine, fail)
    with caplog.at_level(logging.ERROR):
        assert_same(run(engine, requests(2)), expected)
    assert caplog.text.count("serving eagerly") == 1


@pytest.mark.parametrize(
    ("smallest", "growth", "largest", "expected"),
    [(1, 2, 1, [1]), (1, 2, 8, [1, 2, 4, 8]), (1, 2, 12, [1, 2, 4, 8, 12]), (32, 4, 16, [16])],
)
def test_buckets(smallest: int, growth: int, largest: int, expected: list[int]) -> None:
    assert buckets(smallest, growth, largest) == expected
