"""Metrics against what was observed, and against promtool where there is one."""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from service.contract.output import DraftCounts, GateStats, StepStats
from service.observability.drift import GateDrift
from service.observability.metrics import ArrayHistogram, Metrics
from tests.support.fake_engine import EXPERTS, fake_info, write_bundle


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    metrics = Metrics(CollectorRegistry())
    metrics.describe_engine(fake_info(write_bundle(tmp_path)))
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_an_array_is_observed_as_its_values_one_by_one() -> None:
    values = np.random.default_rng(0).uniform(0, 3, 500).astype(np.float32)
    values[:4] = [0.5, 1.0, 2.0, math.nan]  # on the bounds, and nothing
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = ArrayHistogram("h", "Help.", (0.5, 1.0, 2.0), "phase")
    ours.register(histogram)
    oracle = Histogram("h", "Help.", ["phase"], registry=theirs, buckets=(0.5, 1.0, 2.0))
    for part in np.split(values, 5):
        histogram.observe(part, "prompt")
    for one in values[~np.isnan(values)].tolist():
        oracle.labels("prompt").observe(one)
    for bound in ("0.5", "1.0", "2.0", "+Inf"):
        labels = {"phase": "prompt", "le": bound}
        assert ours.get_sample_value("h_bucket", labels) == theirs.get_sample_value("h_bucket", labels)
    assert ours.get_sample_value("h_sum", {"phase": "prompt"}) == pytest.approx(
        theirs.get_sample_value("h_sum", {"phase": "prompt"})
    )


def test_a_step_is_counted_once(metrics: Metrics) -> None:
    gate = GateStats(
        prompt_entropy=np.array([0.1, math.nan], np.float32).tobytes(),
        generated_entropy=np.array([1.0], np.float32).tobytes(),
        weight=[1.5, 0.25, 0.25],
        top1=[2, 0, 0],
    )
    metrics.observe_step(
        StepStats(
            step_seconds=0.002, scaling_rows=5, real_rows=4, drafts=DraftCounts([2], [1], [3, 2], [0, 1, 1]),
            preemptions=1, requests_running=3, requests_waiting=2, kv_blocks_used=6,
            kv_blocks_total=8, gate=gate,
        )
    )  # fmt: skip
    assert value(metrics, "xlora_rows_total", stream="scaling") == 5
    assert value(metrics, "xlora_rows_total", stream="real") == 4
    assert value(metrics, "xlora_lookahead_drafts_total", outcome="hit") == 2
    assert value(metrics, "xlora_lookahead_drafts_total", outcome="miss") == 1
    assert value(metrics, "xlora_speculated_tokens_total", outcome="accepted") == 5
    assert value(metrics, "xlora_speculated_tokens_total", outcome="rejected") == 2
    assert value(metrics, "xlora_expert_weight_total", expert="math") == 1.5
    assert value(metrics, "xlora_expert_top1_tokens_total", expert="math") == 2
    assert value(metrics, "xlora_gate_entropy_nats_count", phase="prompt") == 1
    assert value(metrics, "xlora_gate_entropy_ratio_sum", phase="generated") == pytest.approx(1 / math.log(3))
    assert value(metrics, "xlora_kv_blocks_used_ratio") == 0.75
    assert (value(metrics, "xlora_requests_running"), value(metrics, "xlora_requests_waiting")) == (3, 2)
    metrics.observe_step(StepStats(kv_blocks_total=8))  # the load after an abort: no step
    assert (value(metrics, "xlora_requests_running"), value(metrics, "xlora_kv_blocks_used_ratio")) == (0, 0)
    assert value(metrics, "xlora_step_seconds_count") == 1


def test_drafts_are_counted_by_source_and_depth(metrics: Metrics) -> None:
    """Steps add up, and the sums of a source are those over its depths; all depths from 8 on share a series."""
    metrics.observe_step(StepStats(drafts=DraftCounts([5, 3, 1], [1, 0, 2], [1] * 7 + [2, 4], [0] * 7 + [1])))
    metrics.observe_step(StepStats(drafts=DraftCounts([1], [0, 4], [], [1])))

    def counts(source: str, outcome: str) -> dict[str, float]:
        labels = {"source": source, "outcome": outcome}
        family = next(one for one in metrics.registry.collect() if one.name == "xlora_draft_tokens")
        found = [one for one in family.samples if one.name.endswith("_total") and labels.items() <= one.labels.items()]
        return {one.labels["depth"]: one.value for one in found if one.value}

    assert counts("lookahead", "kept") == {"1": 6, "2": 3, "3": 1}
    assert counts("lookahead", "dropped") == {"1": 1, "2": 4, "3": 2}
    assert counts("prompt_lookup", "kept") == {**dict.fromkeys("1234567", 1), "8+": 6}
    assert counts("prompt_lookup", "dropped") == {"1": 1, "8+": 1}
    assert value(metrics, "xlora_lookahead_drafts_total", outcome="hit") == 10
    assert value(metrics, "xlora_speculated_tokens_total", outcome="rejected") == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_counter_takes_what_is_not_finite(metrics: Metrics, bad: float) -> None:
    """It would keep it until the process ends."""
    bytes_of = np.array([bad, 0.5], np.float32).tobytes()
    metrics.observe_step(StepStats(gate=GateStats(bytes_of, bytes_of, weight=[bad, 1.0, 1.0], top1=[1, 0, 0])))
    metrics.observe_step(StepStats(gate=GateStats(bytes_of, bytes_of, weight=[0.5, 0.25, 0.25], top1=[1, 0, 0])))
    text = metrics.render().decode()
    assert not re.search(r"^xlora_(?!gate_drift).* [-+]?(nan|inf)", text, re.IGNORECASE | re.MULTILINE)
    assert value(metrics, "xlora_expert_weight_total", expert="math") == 0.5


def test_what_is_added_up_is_there_at_every_look(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a look, after it, and when there is so much that nobody is waited for."""
    monkeypatch.setattr("service.observability.metrics._MAX_PENDING", 3)
    for number in range(1, 9):
        metrics.observe_tokens(2, [0.002, 0.2], forwards=3)
        metrics.observe_step(StepStats(step_seconds=0.01, real_rows=5))
        assert len(metrics._pending.gaps) < 4
        if number % 4 == 0:
            assert value(metrics, "xlora_generated_tokens_total") == 2 * number
            assert value(metrics, "xlora_sequence_forwards_total") == 3 * number
            assert value(metrics, "xlora_inter_token_latency_seconds_count") == 2 * number
            assert value(metrics, "xlora_inter_token_latency_seconds_bucket", le="0.0025") == number
            assert value(metrics, "xlora_step_seconds_sum") == pytest.approx(0.01 * number)
            assert value(metrics, "xlora_rows_total", stream="real") == 5 * number
    assert b"xlora_generated_tokens_total 16.0" in metrics.render()


EDGES = [0.0, 0.25, 0.5, 0.75, 1.0]


def profile_of(ratios: np.ndarray, top1: list[float]) -> dict[str, Any]:
    """A gate profile in the shape that the demo's builder writes; the shares of the phases are each other's reverse."""
    counts = np.histogram(ratios, EDGES)[0].tolist()
    entropy = {"mean": float(ratios.mean()), "edges": EDGES, "counts": counts}
    return {
        "phases": {
            phase: {"entropy_ratio": entropy, "top1_share": dict(zip(EXPERTS, shares, strict=True))}
            for phase, shares in (("prompt", top1), ("generated", top1[::-1]))
        }
    }


def with_profile(tmp_path: Path, profile: dict[str, Any]) -> Metrics:
    metrics = Metrics(CollectorRegistry())
    metrics.describe_engine(replace(fake_info(write_bundle(tmp_path)), gate_profile=profile))
    return metrics


def gate_of(prompt: np.ndarray, generated: np.ndarray, top1: list[int]) -> StepStats:
    nats = [(ratios * math.log(3)).astype(np.float32).tobytes() for ratios in (prompt, generated)]
    return StepStats(gate=GateStats(nats[0], nats[1], [float(count) for count in top1], top1))


def psi(actual: np.ndarray, expected: np.ndarray) -> float:
    a, e = (np.maximum(one / one.sum(), 1e-4) for one in (actual, expected))
    return float(np.sum((a - e) * np.log(a / e)))


def test_drift_is_the_stability_index_of_the_recent_positions(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    reference = random.beta(1, 3, 20_000)
    metrics = with_profile(tmp_path, profile_of(reference, [0.5, 0.3, 0.2]))
    drift = partial(value, metrics, "xlora_gate_drift_psi")
    assert all(math.isnan(drift(distribution=name) or 0) for name in ("prompt_entropy", "generated_entropy", "top1"))

    same, other = random.beta(1, 3, 2000), random.beta(3, 1, 1000)
    # As the reference has it: 2000 prompt positions of [.5, .3, .2] and 1000 generated ones of [.2, .3, .5].
    for part in range(10):
        chunk = slice(part * 200, part * 200 + 200)
        metrics.observe_step(gate_of(same[chunk], other[part * 100 : part * 100 + 100], [120, 90, 90]))
    histogram = [np.histogram(ratios, EDGES)[0] for ratios in (reference, same, other)]
    assert drift(distribution="prompt_entropy") == pytest.approx(psi(histogram[1], histogram[0]), abs=1e-6)
    assert drift(distribution="prompt_entropy") < 0.02
    assert drift(distribution="generated_entropy") == pytest.approx(psi(histogram[2], histogram[0]), abs=1e-6)
    assert drift(distribution="generated_entropy") > 1
    assert drift(distribution="top1") == pytest.approx(0, abs=1e-9)

    collapsed = np.zeros(1024)
    for _ in range(9):  # a window full of one expert: nothing of the earlier traffic is left
        metrics.observe_step(gate_of(collapsed, np.empty(0), [1024, 0, 0]))
    assert drift(distribution="prompt_entropy") == pytest.approx(psi(np.array([1, 0, 0, 0]), histogram[0]))
    assert drift(distribution="top1") == pytest.approx(psi(np.array([1, 0, 0]), np.array([0.5, 0.3, 0.2])))


def test_positions_without_a_gate_and_entropies_over_the_maximum_do_not_break_drift(tmp_path: Path) -> None:
    metrics = with_profile(tmp_path, profile_of(np.full(10, 0.9), [0.5, 0.3, 0.2]))
    metrics.observe_step(gate_of(np.array([1.0001, math.nan] * 600), np.empty(0), [300, 180, 120]))
    assert value(metrics, "xlora_gate_drift_psi", distribution="prompt_entropy") == pytest.approx(0)
    assert value(metrics, "xlora_gate_drift_psi", distribution="top1") == pytest.approx(0)


def test_a_bundle_without_a_profile_has_no_drift(metrics: Metrics) -> None:
    metrics.observe_step(gate_of(np.full(600, 0.5), np.empty(0), [600, 0, 0]))
    assert b"xlora_gate_drift_psi{" not in metrics.render()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"phases": {"prompt": {}}}, "phases.generated is missing"),
        ({"entropy": 0.5}, "phases is missing"),
        ({"counts": [1, 2]}, "one count fewer"),
        ({"counts": [0, 0, 0, 0]}, "not all 0"),
        ({"edges": [0, 0.5, 0.25, 0.75, 1]}, "rising edges"),
        ({"counts": ["many"]}, "list of numbers"),
        ({"top1_share": {"math": 1}}, "top1_share.code is missing"),
    ],
)
def test_a_profile_that_cannot_be_used_is_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], said: str
) -> None:
    profile = profile_of(np.full(10, 0.9), [0.5, 0.3, 0.2])
    if changed.keys() & {"counts", "edges"}:
        profile["phases"]["generated"]["entropy_ratio"] |= changed
    elif "top1_share" in changed:
        profile["phases"]["generated"] |= changed
    else:
        profile = changed
    metrics = with_profile(tmp_path, profile)
    assert said in caplog.text
    assert b"xlora_gate_drift_psi{" not in metrics.render()


def test_the_demos_own_profile_does_not_drift_from_itself() -> None:
    manifest = json.loads((Path(__file__).parents[2] / "model_store/demo/bundle.json").read_text())
    drift = GateDrift(manifest["gate_profile"], [expert["name"] for expert in manifest["experts"]])
    profile = manifest["gate_profile"]["phases"]["generated"]
    ratios = np.repeat(np.arange(20) / 20 + 0.025, np.array(profile["entropy_ratio"]["counts"]) // 10)
    top1 = [round(len(ratios) * share) for share in profile["top1_share"].values()]
    drift.observe(GateStats(generated_entropy=(ratios * math.log(4)).astype(np.float32).tobytes(), top1=top1))
    assert drift.index("generated_entropy") < 1e-3
    assert drift.index("top1") < 1e-6
    assert math.isnan(drift.index("prompt_entropy"))


def test_every_name_of_the_design_is_there(metrics: Metrics) -> None:
    metrics.requests.labels("/generate", "ok").inc()
    families = {family.name for family in text_string_to_metric_families(metrics.render().decode())}
    expected = [
        *("gate_entropy_nats", "gate_entropy_ratio", "expert_weight", "expert_top1_tokens"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_latency_seconds"),
        *("queue_time_seconds", "step_seconds", "rows", "lookahead_drafts", "prompt_tokens", "generated_tokens"),
        *("requests", "requests_running", "requests_waiting", "kv_blocks_used_ratio", "prefix_cache_tokens"),
        *("speculated_tokens", "draft_tokens", "sequence_forwards", "preemptions", "gate_drift_psi"),
    ]
    assert {f"xlora_{name}" for name in expected} <= families


def test_promtool_finds_nothing(metrics: Metrics, promtool: str) -> None:
    metrics.observe_step(StepStats(gate=GateStats(b"", np.array([1.0], np.float32).tobytes(), [1, 0, 0], [1, 0, 0])))
    checked = subprocess.run([promtool, "check", "metrics"], input=metrics.render(), capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_two_registries_do_not_meet() -> None:
    Metrics(CollectorRegistry())
    Metrics(CollectorRegistry())
