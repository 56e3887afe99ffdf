"""Steps that are launched before the results of the step before are written, as on a GPU: everyone gets the same.

The oracle is the same engine on the same device one step at a time. A device that computes at once hides nothing here:
what would be read too late has been overwritten by then, by the next step, in a block that was given away, or in a
captured step's buffers.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from service.contract import wire
from service.contract.output import GateStats, StepOutput
from service.contract.request import Request, SamplingParams
from service.contract.steering import Steering
from service.engine.engine import Engine
from service.engine.gate.report import GateReading, GateReporter
from service.engine.launched_step import LaunchedStep
from service.engine.out_of_memory import OutOfMemory
from service.engine.plan import ScheduledSequence
from service.engine.sequence import Sequence
from service.engine.worker import Disconnected, Worker
from service.model.transfer import HostCopies
from tests.engine.gate.test_scalings_log import logged
from tests.engine.test_captured_steps import CallAgain, with_captured_steps
from tests.engine.test_engine import mixed_requests, same
from tests.engine.test_grammar import formed_requests
from tests.engine.test_speculation import PLAIN
from tests.support.driver import Engines, Run, greedy, run, words

KINDS = {
    "as it is": {},
    "no drafts": PLAIN,
    "chunks": {"max_num_batched_tokens": 9},
    "preemption": {"blocks": 70, "max_model_len": 96},
    "captured": {"native_kernels": False},
    "long steps after the results": {},
}


def workload() -> list[Request]:
    """One of every kind."""
    everything: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}
    return [
        *mixed_requests(),
        *(replace(made, id=f"form {made.id}") for made in formed_requests()[1::2]),
        replace(greedy("steered", words(30, 12), 9, **everything), steering=Steering(only=(0, 2), temperature=0.5)),
        replace(greedy("fixed", words(31, 12), 9, **everything), steering=Steering(weights=())),
        greedy("frozen", words(32, 12), 19, freeze_after=3, **everything),
        Request("prompt", words(33, 40), SamplingParams(max_tokens=3, logprobs=0, prompt_logprobs=2, seed=1)),
        Request("score", words(34, 40), SamplingParams(max_tokens=0, prompt_logprobs=1), score_from=20),
        replace(mixed_requests()[0], id="again"),
    ]


def served(steps: list[StepOutput]) -> tuple[GateStats, int, int]:
    """The statistics of a run."""
    total = GateStats()
    for step in steps:
        total.add(step.stats.gate)
    return total, sum(step.stats.real_rows for step in steps), sum(step.stats.drafts.hits for step in steps)


def ran(engine: Engine, kind: str) -> Run:
    engine.log_scalings(True)
    if kind.startswith("long") and engine.runner.overlapped_rows:
        engine.runner.overlapped_rows = 24
    if kind == "captured":
        with_captured_steps(engine, CallAgain(), max_rows=48)
    aborts: dict[int, list[tuple[str, int | None]]] = {
        3: [("n", 1)], 6: [("stop", None)], 9: [("form choices", 2)], 12: [("goes", None)],
    }  # fmt: skip
    return run(engine, [*workload(), greedy("goes", words(40, 30), 40)], aborts=aborts)


@pytest.mark.parametrize("kind", KINDS)
def test_everyone_gets_the_same(engines: Engines, kind: str) -> None:
    plain = ran(engines.build(adaptive=False, **KINDS[kind]), kind)
    ours = ran(engines.build(adaptive=False, overlaps=True, **KINDS[kind]), kind)
    assert kind != "preemption" or ours.preemptions
    cut = {("n", 1), ("stop", 0), ("form choices", 2), ("goes", 0)}  # after as many tokens as there were by then
    for key, theirs in plain.choices.items():
        if key in cut:
            continue
        same(ours[key], theirs)
        for which in ("token_outputs", "prompt_logprobs"):
            for token, expected in zip(getattr(ours[key], which), getattr(theirs, which), strict=True):
                assert token.id == expected.id
                assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
                assert [id for id, _ in token.top_logprobs] == [id for id, _ in expected.top_logprobs]
        usages = [one.usage for one in (ours[key], theirs)]
        assert len({usage and usage.gate_positions for usage in usages}) == 1
    assert ours.choices.keys() >= plain.choices.keys() - cut
    log, expected_log = logged(ours.steps), logged(plain.steps)
    assert log.keys() == expected_log.keys()
    for key in log.keys() - cut:
        usages = [run[key].usage for run in (ours, plain)]
        computed = max(usage.cached_tokens for usage in usages if usage is not None)  # from here on by both
        assert {p for p in log[key] if p >= computed} == {p for p in expected_log[key] if p >= computed}
        for position in log[key].keys() & expected_log[key].keys():
            np.testing.assert_allclose(log[key][position], expected_log[key][position], atol=1e-5, rtol=0)


def test_statistics_are_complete(engines: Engines) -> None:
    """Nothing is counted twice or left out, when a step's rows are written after the next has begun."""
    plain, ours = (
        run(engines.build(prefix_cache=False, adaptive=False, overlaps=which), workload()) for which in (False, True)
    )
    (expected, *counts), (stats, *own) = served(plain.steps), served(ours.steps)
    assert own == counts
    for name in ("prompt_entropy", "generated_entropy"):
        theirs, mine = (np.sort(np.frombuffer(getattr(one, name), np.float32)) for one in (expected, stats))
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert stats.weight == pytest.approx(expected.weight, abs=1e-3)


def test_the_next_step_is_launched_before_the_results_are_returned(engines: Engines) -> None:
    engine = engines.build(overlaps=True)
    engine.add(greedy("a", words(1, 9), 12))
    launch, launches = engine.runner.launch, []

    def count(*args: Any, **kwargs: Any) -> Any:
        launches.append(args)
        return launch(*args, **kwargs)

    engine.runner.launch = count  # type: ignore[method-assign]
    steps = 0
    while engine.has_work():
        engine.step()
        steps += 1
        assert len(launches) == steps + engine.has_work()


@pytest.mark.parametrize("at", [1, 2, 5])
def test_too_large_a_next_step_ends_one_and_loses_nothing(
    engines: Engines, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of the step before are still to be written when the memory runs out: they come before the end, also
    those of whom it ends.
    """
    options: dict[str, Any] = {"prefix_cache": False, "adaptive": False}
    everything: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}
    requests = [greedy("a", words(1, 9), 12, **everything), greedy("large", words(2, 60), 30, **everything)]
    expected = run(engines.build(**options), requests)
    engine = engines.build(overlaps=True, **options)
    engine.log_scalings(True)
    launch, launches = engine.runner.launch, iter(range(100))
    scheduled: list[Sequence] = []

    def run_out(plan: list[ScheduledSequence], **how: Any) -> Any:
        scheduled[:] = [one.sequence for one in plan]
        if next(launches) == at:
            raise OutOfMemory
        return launch(plan, **how)

    monkeypatch.setattr(engine.runner, "launch", run_out)
    accepted: dict[str, list[int]] = {}

    def note(_: Engine, step: StepOutput) -> None:
        accepted.update({one.request.id: one.tokens[one.prompt_len :] for one in scheduled})

    ours = run(engine, requests, each_step=note)
    [(name, _)] = [key for key, one in ours.choices.items() if one.error == "the server is out of memory"]
    [other] = {"a", "large"} - {name}
    same(ours[other], expected[other])
    assert ours[name].tokens == accepted[name] == expected[name].tokens[: len(accepted[name])]
    if accepted[name]:
        np.testing.assert_allclose(ours[name].full, expected[name].full[: ours[name].rows], atol=1e-5, rtol=0)
    [end] = [i for i, step in enumerate(ours.steps) if any(one.error for one in step.outputs)]
    assert not any(rows.request_id == name for step in ours.steps[end + 1 :] for rows in step.stats.logged)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
@pytest.mark.parametrize("at", [0, 6])
def test_no_memory_for_gate_rows_beside_a_step(
    engines: Engines, at: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read behind the forward, where memory is least: it ends one request, as in a forward."""
    requests = [greedy("a", words(1, 9), 12, return_scalings="mean"), greedy("large", words(2, 60), 30)]
    expected = run(engines.build(adaptive=False), requests)
    engine = engines.build(adaptive=False, overlaps=True)
    read, reads = GateReporter._read, iter(range(1000))  # one with every launch, one after it

    def run_out(*args: Any) -> list[GateReading]:
        if next(reads) == at:
            raise error
        return read(*args)

    monkeypatch.setattr(GateReporter, "_read", run_out)
    ours = run(engine, requests)
    [(name, _)] = [key for key, one in ours.choices.items() if one.error == "the server is out of memory"]
    [other] = {"a", "large"} - {name}
    same(ours[other], expected[other])


def test_no_memory_to_read_what_has_ended(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of last positions are lost, and nothing else: neither rows that were asked for nor the engine."""
    requests = [greedy("a", words(1, 9), 12, return_scalings="mean"), greedy("b", words(2, 9), 20)]
    expected = run(engines.build(adaptive=False), requests)
    read_now = GateReporter._read_now

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def read(self: GateReporter, ends: Any) -> list[GateReading]:
        with monkeypatch.context() as patch:
            patch.setattr(GateReporter, "_read", run_out)
            return read_now(self, ends)

    monkeypatch.setattr(GateReporter, "_read_now", read)
    aborted = greedy("aborted", words(3, 9), 20)
    ours = run(engines.build(adaptive=False, overlaps=True), [*requests, aborted], aborts={4: [("aborted", None)]})
    for made in requests:
        same(ours[made.id], expected[made.id])


def test_what_comes_while_the_device_computes_is_in_time_for_the_next_step(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a request would wait for one more step, and rows of one that has ended would run in it."""
    engine = engines.build(overlaps=True)
    engine.add(greedy("a", words(1, 9), 12))
    ours, theirs = socket.socketpair()
    encoder = wire.FrameEncoder()
    launch = engine.runner.launch
    launches: list[set[str]] = []
    flights: list[HostCopies] = []

    def note(scheduled: list[ScheduledSequence], **how: Any) -> LaunchedStep:
        launched = launch(scheduled, **how)
        launches.append({one.sequence.request.id for one in scheduled})
        flights.append(launched.copies)
        return launched

    def third_takes_its_time(copies: HostCopies) -> None:
        if len(flights) == 3 and copies is flights[2]:
            ours.sendall(encoder.encode(wire.Abort("a")))
            ours.sendall(encoder.encode(wire.Submit(greedy("b", words(2, 9), 12))))
            flights.append(HostCopies(torch.device("cpu")))  # once
        if len(launches) == 4:
            ours.shutdown(socket.SHUT_WR)

    monkeypatch.setattr(engine.runner, "launch", note)
    monkeypatch.setattr(HostCopies, "wait", third_takes_its_time)
    with ours, theirs, pytest.raises(Disconnected):
        Worker(theirs, lambda *_: engine)._loop(engine)
    assert launches[:4] == [{"a"}, {"a"}, {"a"}, {"b"}]


def test_aborted_with_nothing_else_to_do(engines: Engines) -> None:
    """The step that is on the device is waited for, and says nothing of it."""
    engine = engines.build(overlaps=True)
    engine.add(greedy("a", words(1, 9), 12))
    engine.step()
    engine.abort("a")
    assert engine.has_work()
    assert engine.blocks.used == 0
    output = engine.step()
    assert not output.outputs
    assert output.stats.real_rows == 9  # the device has computed them: a step, for the metrics and for readiness
    assert not engine.has_work()
