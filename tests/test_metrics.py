"""Metrics against what was observed, and against promtool where there is one."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from service.engine.request import GateStats, StepStats
from service.metrics import ArrayHistogram, Metrics
from tests.fake_engine import fake_info, write_bundle


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
    histogram = ArrayHistogram("h", "Help.", "phase", (0.5, 1.0, 2.0))
    ours.register(histogram)
    oracle = Histogram("h", "Help.", ["phase"], registry=theirs, buckets=(0.5, 1.0, 2.0))
    for part in np.split(values, 5):
        histogram.observe("prompt", part)
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
            step_seconds=0.002, scaling_rows=5, real_rows=4, draft_hits=2, draft_misses=1, speculated_tokens=7,
            accepted_tokens=5, preemptions=1, requests_running=3, requests_waiting=2, kv_blocks_used=6,
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


def test_every_name_of_the_design_is_there(metrics: Metrics) -> None:
    metrics.requests.labels("/generate", "ok").inc()
    families = {family.name for family in text_string_to_metric_families(metrics.render().decode())}
    expected = [
        *("gate_entropy_nats", "gate_entropy_ratio", "expert_weight", "expert_top1_tokens"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_latency_seconds"),
        *("queue_time_seconds", "step_seconds", "rows", "lookahead_drafts", "prompt_tokens", "generated_tokens"),
        *("requests", "requests_running", "requests_waiting", "kv_blocks_used_ratio", "prefix_cache_tokens"),
        *("speculated_tokens", "preemptions"),
    ]
    assert {f"xlora_{name}" for name in expected} <= families


def test_promtool_finds_nothing(metrics: Metrics, promtool: str) -> None:
    metrics.observe_step(StepStats(gate=GateStats(b"", np.array([1.0], np.float32).tobytes(), [1, 0, 0], [1, 0, 0])))
    checked = subprocess.run([promtool, "check", "metrics"], input=metrics.render(), capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_two_registries_do_not_meet() -> None:
    Metrics(CollectorRegistry())
    Metrics(CollectorRegistry())
