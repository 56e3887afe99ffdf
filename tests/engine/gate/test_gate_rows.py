"""Gate rows and gate statistics that leave the engine: the right positions, each once, the numbers the oracle has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.output import DraftCounts, GateStats, StepOutput
from service.contract.request import Request, SamplingParams
from service.engine.engine import Engine
from service.engine.gate.report import ReportSpan, gate_stats
from service.engine.out_of_memory import OutOfMemory
from service.engine.plan import ScheduledSequence
from service.engine.sequence import Sequence
from service.model.gate_stats import GateSummary, PendingSummary
from service.model.transfer import HostCopies
from tests.support.driver import Array, Engines, Run, greedy, run, sampled, words
from tests.support.recompute import position_summary
from tests.support.tiny import Tiny

PROMPT = words(1, 21)

# -- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [7, 1024])
@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (None, (20, 10)),
        (0, (0, 30)),
        (8, (8, 22)),
        (19, (19, 11)),
        (21, (21, 9)),
        (25, (25, 5)),
        (29, (29, 1)),
        (30, (None, 0)),
    ],
)
def test_rows_returned(
    engines: Engines, lookahead: bool, budget: int, start: int | None, expected: tuple[int | None, int]
) -> None:
    """Off by one at either end: the last row is the position that produced the last token, never the last token's
    own.
    """
    request = greedy("a", PROMPT, 10, return_scalings="full", scalings_start=start)
    choice = run(engines.build(lookahead=lookahead, max_num_batched_tokens=budget), [request])["a"]
    assert (choice.start, choice.rows) == expected
    if choice.rows:
        scalings = engines.tiny.as_stored().oracle().scalings(PROMPT + choice.tokens)
        np.testing.assert_allclose(choice.full, scalings[choice.start : 30], atol=1e-5, rtol=0)


def test_rows_come_with_their_tokens(engines: Engines, lookahead: bool) -> None:
    """One row per generated token, in the same step: a stream can show the token in its colour."""
    engine = engines.build(lookahead=lookahead)
    result = run(engine, [greedy("a", PROMPT, 10, return_scalings="mean")])
    pieces = [piece for step in result.steps for piece in step.outputs]
    assert [(len(piece.tokens), piece.gate.count if piece.gate else 0) for piece in pieces] == [(1, 1)] * 10
    assert result["a"].fulls == []


def test_none_means_none(engines: Engines) -> None:
    """Nobody pays for rows that were not asked for."""
    result = run(engines.build(), [greedy("a", PROMPT, 5, scalings_start=0)])
    assert result["a"].rows == 0


def test_mean_and_entropy_are_those_of_full(engines: Engines) -> None:
    """The same rows whether asked for as mean or as full, and DESIGN section 2's formulas."""
    full = run(engines.build(), [greedy("a", PROMPT, 8, return_scalings="full", scalings_start=0)])["a"]
    mean = run(engines.build(), [greedy("a", PROMPT, 8, return_scalings="mean", scalings_start=0)])["a"]
    np.testing.assert_array_equal(mean.mean, full.mean)
    np.testing.assert_array_equal(mean.entropy, full.entropy)
    for row, mean_row, entropy in zip(full.full, full.mean, full.entropy, strict=True):
        expected_mean, _, expected_entropy = position_summary(row)
        np.testing.assert_allclose(mean_row, expected_mean, atol=1e-6)
        np.testing.assert_allclose(entropy, expected_entropy, atol=1e-5)


# -- a scaling pass alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [7, 1024])
@pytest.mark.parametrize(("start", "first"), [(0, 0), (5, 5), (None, 29)])
def test_scaling_pass_alone(engines: Engines, budget: int, start: int | None, first: int) -> None:
    """Rows of the text itself, from one KV stream, without a token and without statistics of served positions."""
    text, held = words(3, 30), []
    request = Request("look", text, None, "full", start)
    result = run(
        engines.build(max_num_batched_tokens=budget),
        [request],
        each_step=lambda engine, step: held.append(step.stats.kv_blocks_used),
    )
    look = result["look"]
    assert (look.start, look.rows, look.tokens, look.finish_reason) == (first, 30 - first, [], "length")
    scalings = engines.tiny.as_stored().oracle().scalings(text)
    np.testing.assert_allclose(look.full, scalings[first:], atol=1e-5, rtol=0)
    assert max(held) <= -(-30 // 4)
    assert all(step.stats.real_rows == 0 for step in result.steps)
    assert sum(step.stats.scaling_rows for step in result.steps) == 30
    assert all(not step.stats.gate.weight for step in result.steps)


def test_scaling_pass_amid_generation(engines: Engines) -> None:
    """Rows of requests that look and of requests that generate lie in one tensor: neither gets the other's."""
    text = words(3, 30)
    requests = [
        greedy("a", words(4, 11), 9, return_scalings="full", scalings_start=0),
        Request("look", text, None, "full", 0),
        greedy("b", words(5, 23), 9, return_scalings="full", scalings_start=0),
    ]
    result = run(engines.build(max_num_batched_tokens=13), requests)
    oracle = engines.tiny.as_stored().oracle()
    np.testing.assert_allclose(result["look"].full, oracle.scalings(text), atol=1e-5, rtol=0)
    for name, prompt in (("a", words(4, 11)), ("b", words(5, 23))):
        expected = oracle.scalings(prompt + result[name].tokens)[:-1]
        np.testing.assert_allclose(result[name].full, expected, atol=1e-5, rtol=0)


# -- statistics of served positions ------------------------------------------------------------------------------------


def observed(result: Run, experts: int) -> tuple[Array, Array, Array, Array]:
    """Prompt entropies, generated entropies, weights and top-1 counts over all steps."""
    stats = [step.stats.gate for step in result.steps]
    prompt = np.concatenate([np.frombuffer(gate.prompt_entropy, np.float32) for gate in stats])
    generated = np.concatenate([np.frombuffer(gate.generated_entropy, np.float32) for gate in stats])
    weight = sum((np.array(gate.weight) for gate in stats if gate.weight), np.zeros(experts))
    top1 = sum((np.array(gate.top1) for gate in stats if gate.top1), np.zeros(experts, dtype=int))
    return prompt, generated, weight, top1


def recomputed(result: Run, prompts: dict[str, int], experts: int) -> tuple[Array, Array, Array, Array]:
    """The same from the returned full rows (all of them: scalings_start 0)."""
    prompt, generated, weight, top1 = [], [], np.zeros(experts), np.zeros(experts, dtype=int)
    for (name, _), choice in result.choices.items():
        if name not in prompts:
            continue
        for position, row in enumerate(choice.full):
            _, share, entropy = position_summary(row)
            (prompt if position < prompts[name] - 1 else generated).append(entropy)
            weight += share
            if share.any():
                top1[int(share.astype(np.float32).argmax())] += 1
    return np.array(prompt), np.array(generated), weight, top1


def assert_observed_once(result: Run, requests: list[Request], experts: int) -> None:
    """Every returned position of every choice, each exactly once, under the right phase."""
    prompts = {request.id: len(request.prompt_token_ids) for request in requests if request.sampling is not None}
    for ours, theirs in zip(observed(result, experts), recomputed(result, prompts, experts), strict=True):
        assert ours.shape == theirs.shape
        in_order = ours.dtype == np.float32  # entropies come step by step, choices mixed: compare them as sets
        ours, theirs = (np.sort(values) if in_order else values for values in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def summary_of(scalings: torch.Tensor) -> GateSummary:
    return PendingSummary(scalings, HostCopies(scalings.device)).read()


def requests_of_all_kinds() -> list[Request]:
    everything: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}
    return [
        greedy("a", words(1, 21), 12, **everything),
        Request("b", words(2, 6), SamplingParams(max_tokens=15, seed=2, ignore_eos=True), **everything),
        Request("c", [7], SamplingParams(max_tokens=4, seed=2, ignore_eos=True), **everything),
        Request("d", words(4, 33), SamplingParams(max_tokens=1, ignore_eos=True), **everything),
        Request("look", words(5, 17), None, **everything),
    ]


@pytest.mark.parametrize("budget", [1024, 16, 7])
def test_statistics(engines: Engines, lookahead: bool, budget: int) -> None:
    """A dropped draft that is counted, a chunk that is counted twice, the last prompt position under the wrong
    phase.
    """
    requests = requests_of_all_kinds()
    result = run(engines.build(lookahead=lookahead, max_num_batched_tokens=budget), requests)
    assert_observed_once(result, requests, 3)


def test_statistics_after_preemption(engines: Engines, lookahead: bool) -> None:
    """What is computed a second time after a preemption is not observed a second time."""
    requests = [sampled(f"{i}", words(60 + i, 8 + i), 24, seed=i) for i in range(6)]
    requests = [Request(r.id, r.prompt_token_ids, r.sampling, "full", 0) for r in requests]
    result = run(engines.build(lookahead=lookahead, max_model_len=64, blocks=32), requests)
    assert result.preemptions > 0
    assert_observed_once(result, requests, 3)


def test_statistics_of_several_choices(engines: Engines, lookahead: bool) -> None:
    """Choices that share their prompt's blocks: each choice's positions once, whether it computed them or not."""
    requests = [Request("n", words(9, 18), SamplingParams(max_tokens=7, n=2, seed=1, ignore_eos=True), "full", 0)]
    for block_size in (4, 32):
        result = run(engines.build(lookahead=lookahead, block_size=block_size), requests)
        assert_observed_once(result, requests, 3)


@pytest.mark.parametrize("steps", [1, 3, 7, 15])
@pytest.mark.parametrize("shed", [False, True])
def test_statistics_of_a_dropped_request(
    engines: Engines, steps: int, shed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked for rows, so several steps are read in one go: what was final counts, whenever it ends, and whether
    its caller ends it or the memory.
    """

    def run_out(*_: Any, **__: Any) -> None:
        raise OutOfMemory

    engine = engines.build(prefix_cache=False)
    engine.add(greedy("a", words(1, 12), 40))
    [sequence] = engine._sequences["a"]
    stats = [engine.step().stats.gate for _ in range(steps)]
    final = sequence.final
    if shed:
        monkeypatch.setattr(engine.runner, "launch", run_out)
        stats.append(engine.step().stats.gate)
    else:
        engine.abort("a")
        stats.append(engine.report().stats.gate)
    assert sum(len(one.prompt_entropy + one.generated_entropy) for one in stats) == 4 * final


def test_phases_of_one_report() -> None:
    """A chunk that ends before its prompt does must not colour the rows of the next sequence in the report."""
    half, done = (Sequence.of(greedy(name, words(1, 20), 4), 0, 0.0) for name in "ab")
    scalings = torch.rand(7, 3, 4)
    summary = summary_of(scalings)
    stats = gate_stats([ReportSpan(half, 0, 5, 0), ReportSpan(done, 20, 2, 5)], summary)
    np.testing.assert_array_equal(np.frombuffer(stats.prompt_entropy, np.float32), summary.entropy[:5])
    np.testing.assert_array_equal(np.frombuffer(stats.generated_entropy, np.float32), summary.entropy[5:])
    assert (half.usage.gate_positions, done.usage.gate_positions) == (0, 2)
    assert done.usage.gate_entropy_sum == pytest.approx(summary.entropy[5:].sum())
    assert done.usage.gate_share_sum == pytest.approx(summary.share[5:].sum(axis=0))


def test_statistics_add_up_until_they_are_taken() -> None:
    """Several requests may be aborted between two steps."""
    scalings = torch.rand(7, 3, 4)
    sequence = Sequence.of(greedy("a", words(1, 3), 9), 0, 0.0)
    ours, theirs = (
        GateStats(),
        gate_stats([ReportSpan(sequence, 0, 7, 0)], summary_of(scalings)),
    )
    ours.add(gate_stats([ReportSpan(sequence, 0, 3, 0)], summary_of(scalings[:3])))
    ours.add(gate_stats([ReportSpan(sequence, 3, 4, 0)], summary_of(scalings[3:])))
    assert (ours.prompt_entropy, ours.generated_entropy) == (theirs.prompt_entropy, theirs.generated_entropy)
    assert ours.weight == pytest.approx(theirs.weight)
    assert ours.top1 == theirs.top1
    assert sequence.usage.gate_positions == 2 * 5


def test_who_waits_to_be_read(engines: Engines) -> None:
    """Nobody at its first, at its last, or who asked for rows; others for a few steps, and not for ever."""
    sequences = [Sequence.of(greedy(name, words(1, 20), 4), 0, 0.0) for name in "abcd"]
    later, first, asks, last = (ScheduledSequence(sequence, 22, 1, 21, 1, 1, 0, 0) for sequence in sequences)
    asks.sequence.request = replace(asks.sequence.request, return_scalings="mean")
    later.sequence.reported = asks.sequence.reported = last.sequence.reported = 20
    last.sequence.tokens += [5, 5, 5]
    observer = engines.build()._reporter
    assert observer.due([later, first, asks, last]) == [first, asks, last]
    steps = next(step for step in range(100) if observer.due([later]))
    assert 4 < steps < 64


@pytest.mark.parametrize(
    "xlora",
    [
        {"enable_softmax": False},
        {"enable_softmax": False, "top_k_lora": 1},
        {"layerwise_scalings": False, "top_k_lora": 2},
        {"scaling_pass_value": None, "enable_softmax_topk": True, "top_k_lora": 2},
    ],
    ids=str,
)
def test_statistics_of_other_gates(tiny: Tiny, xlora: dict[str, Any]) -> None:
    """Negative and sparse scalings, one row for all sites."""
    requests = requests_of_all_kinds()
    result = run(Engines(tiny.variant(**xlora)).build(max_num_batched_tokens=16), requests)
    assert_observed_once(result, requests, 3)


def test_a_gate_that_is_always_zero(tiny: Tiny) -> None:
    """No expert acts anywhere: entropy is NaN, nobody leads, and generation goes on as the base model's."""
    variant = tiny.variant(enable_softmax=False, seed=1)
    layers = tuple(
        (weight * 0, None if bias is None else bias * 0) for weight, bias in variant.checkpoint.classifier.layers
    )
    object.__setattr__(variant.checkpoint.classifier, "layers", layers)
    requests = requests_of_all_kinds()
    result = run(Engines(variant).build(), requests)
    assert np.isnan(result["a"].entropy).all()
    prompt, generated, weight, top1 = observed(result, 3)
    assert len(prompt) == 20 + 5 + 0 + 32
    assert len(generated) == 12 + 15 + 4 + 1
    assert np.isnan(prompt).all()
    assert weight.sum() == top1.sum() == 0


def test_one_expert(tmp_path_factory: pytest.TempPathFactory) -> None:
    """E = 1: every scaling is 1 under softmax, every entropy 0."""
    tiny = Tiny(tmp_path_factory.mktemp("one") / "one", experts=["only"], layers=1, xlora={"layerwise_scalings": True})
    requests = requests_of_all_kinds()
    result = run(Engines(tiny.as_stored()).build(), requests)
    assert (result["a"].full == 1).all()
    assert (result["a"].entropy == 0).all()
    assert_observed_once(result, requests, 1)


# -- the numbers of a step -------------------------------------------------------------------------------------------


def test_steps_and_usage_add_up(engines: Engines, lookahead: bool) -> None:
    """Rows, hits and misses summed over steps are those summed over choices;
    the gauges are true at the end of each step.
    """
    requests = requests_of_all_kinds()
    running = []
    result = run(
        engines.build(lookahead=lookahead, max_num_seqs=2, max_num_batched_tokens=16),
        requests,
        each_step=lambda engine, step: running.append((step.stats.kv_blocks_used, engine.blocks.used)),
    )
    usages = [choice.usage for choice in result.choices.values() if choice.usage is not None]
    assert len(usages) == len(requests)
    for name in ("scaling_rows", "real_rows"):
        assert sum(getattr(step.stats, name) for step in result.steps) == sum(getattr(usage, name) for usage in usages)
    of_steps, of_choices = DraftCounts(), DraftCounts()
    for step in result.steps:
        of_steps.add(step.stats.drafts)
    for usage in usages:
        of_choices.add(usage.drafts)
    assert of_steps == of_choices
    assert bool(of_steps.hits) == lookahead
    assert all(reported == held for reported, held in running)
    for step in result.steps:
        assert step.stats.requests_running <= 2
        assert step.stats.scaling_rows + step.stats.real_rows <= 16
        assert step.stats.step_seconds > 0
        assert (
            step.stats.kv_blocks_total == step.stats.kv_blocks_used
            or step.stats.kv_blocks_used < step.stats.kv_blocks_total
        )
    assert (result.steps[-1].stats.requests_running, result.steps[-1].stats.requests_waiting) == (0, 0)
    assert all(usage.queue_seconds >= 0 for usage in usages)
    assert max(usage.queue_seconds for usage in usages) > min(usage.queue_seconds for usage in usages)


def test_usage_says_what_the_gate_did(engines: Engines) -> None:
    """For the log: the mean over the positions that produced tokens, whoever asked for rows, drafts and neighbours
    notwithstanding; and something from the first token on.
    """
    made = [
        Request(str(i), words(i, 5 + 9 * i), SamplingParams(max_tokens=12, seed=i, n=1 + i % 2, ignore_eos=True))
        for i in range(4)
    ]
    rows = run(engines.build(), [replace(one, return_scalings="full") for one in made])
    least: list[int] = []  # of any choice with a token, after each step

    def look(_: Engine, output: StepOutput) -> None:
        least.extend(piece.usage.gate_positions for piece in output.outputs if piece.tokens and piece.usage)

    result = run(engines.build(adaptive=False), made, each_step=look)
    assert min(least) > 0
    for key, choice in result.choices.items():
        assert choice.usage is not None
        assert choice.usage.gate_positions == 12
        assert choice.usage.gate_entropy_sum == pytest.approx(rows[key].entropy.sum(), rel=1e-4)
        full = np.abs(np.concatenate(rows[key].fulls))
        share = (full / full.sum(-1, keepdims=True)).mean(1).sum(0)
        assert choice.usage.gate_share_sum == pytest.approx(share, rel=1e-4)
