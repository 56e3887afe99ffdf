"""Every metric of the service, on a registry of the caller's choice. A leaf: no torch, no engine, no HTTP.

Names start with xlora_, units are base units, labels have few values (experts, endpoints, outcomes; never a request).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from service.drift import DISTRIBUTIONS, PHASES, GateDrift, ProfileError

if TYPE_CHECKING:
    from service.engine.request import EngineInfo, GateStats, StepStats

_LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
_STEP_SECONDS = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ENTROPY_NATS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
_RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 21))

logger = logging.getLogger("xlora.metrics")


class ArrayHistogram(Collector):
    """A histogram that observes whole arrays at once: one observation per position, at the cost of one per step."""

    def __init__(self, name: str, documentation: str, label: str, bounds: Sequence[float]) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._bounds = np.array(bounds)
        self._counts: dict[str, npt.NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, label_value: str, values: npt.NDArray[np.floating]) -> None:
        """Adds every finite value; NaN (a position without a gate) is not an observation."""
        finite = values[np.isfinite(values)]
        buckets = np.bincount(np.searchsorted(self._bounds, finite), minlength=len(self._bounds) + 1)
        self._counts[label_value] = self._counts.get(label_value, np.zeros(len(self._bounds) + 1, np.int64)) + buckets
        self._sums[label_value] = self._sums.get(label_value, 0.0) + float(finite.sum(dtype=np.float64))

    def describe(self) -> Iterable[Metric]:
        """What the registry checks for name clashes."""
        return [HistogramMetricFamily(self._name, self._documentation, labels=[self._label])]

    def collect(self) -> Iterable[Metric]:
        """What a scrape reads."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label])
        bounds = [*(str(bound) for bound in self._bounds.tolist()), "+Inf"]
        for value, counts in self._counts.items():
            cumulated = [(bound, float(count)) for bound, count in zip(bounds, counts.cumsum(), strict=True)]
            family.add_metric([value], buckets=cumulated, sum_value=self._sums[value])
        yield family


class Metrics:
    """The service's metrics. `observe_step` is called once per engine step, the rest by the request handlers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.running = 0  # of the last step, for /health
        self.waiting = 0
        self._experts: list[str] = []
        self._drift: GateDrift | None = None  # None: the bundle has no profile
        self._create_gate()
        self._create_requests()
        self._create_engine()

    def _create_gate(self) -> None:
        def histogram(name: str, documentation: str, bounds: Sequence[float]) -> ArrayHistogram:
            created = ArrayHistogram(name, documentation, "phase", bounds)
            for phase in PHASES:
                created.observe(phase, np.empty(0))
            self.registry.register(created)
            return created

        self._entropy = histogram(
            "xlora_gate_entropy_nats",
            "Entropy of the gate, mean over sites, one observation per position.",
            _ENTROPY_NATS,
        )
        self._entropy_ratio = histogram(
            "xlora_gate_entropy_ratio", "Entropy of the gate over its maximum, ln(number of experts).", _RATIOS
        )
        self._weight = self._counter(
            "expert_weight", "Sum over positions of each expert's share of the gate.", "expert"
        )
        self._top1 = self._counter(
            "expert_top1_tokens", "Positions at which this expert has the largest share.", "expert"
        )
        self._psi = self._gauge(
            "gate_drift_psi",
            "Population stability index of recent positions against the bundle's gate profile; NaN: too few positions.",
            "distribution",
        )

    def _create_requests(self) -> None:
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token.", _LATENCY_SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one choice.", _TOKEN_SECONDS
        )
        self.request_latency = self._histogram(
            "request_latency_seconds", "From the request's arrival to its last token.", _LATENCY_SECONDS
        )
        self.queue_time = self._histogram(
            "queue_time_seconds", "From submission to the first step that worked on it.", _LATENCY_SECONDS
        )
        self.requests = self._counter("requests", "Requests that have ended.", "endpoint", "outcome")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self._prefix_cache = self._counter(
            "prefix_cache_tokens", "Prompt tokens whose keys and values were found (hit) or computed (miss).", "outcome"
        )

    def _create_engine(self) -> None:
        self._step_seconds = self._histogram("step_seconds", "One step of the engine.", _STEP_SECONDS)
        self._rows = self._counter("rows", "Rows computed, by stream.", "stream")
        self._drafts = self._counter(
            "lookahead_drafts", "Drafted scaling rows, kept (hit) or dropped (miss).", "outcome"
        )
        self._speculated = self._counter(
            "speculated_tokens", "Drafts copied from earlier text, kept (accepted) or dropped (rejected).", "outcome"
        )
        self._preemptions = self._counter("preemptions", "Sequences set back because the KV pool was full.")
        self._running = self._gauge("requests_running", "Sequences being worked on.")
        self._waiting = self._gauge("requests_waiting", "Sequences waiting for their first step.")
        self._kv_used = self._gauge("kv_blocks_used_ratio", "Share of the KV pool in use.")
        self._info = self._gauge(
            "info", "Always 1; the labels say what is served.", "model", "dtype", "device", "version"
        )
        # Looked up once: a step costs four times as much where it looks up its labels.
        self._scaling_rows, self._real_rows = (self._rows.labels(stream) for stream in ("scaling", "real"))
        self._draft_hits, self._draft_misses = (self._drafts.labels(outcome) for outcome in ("hit", "miss"))
        self._accepted, self._rejected = (self._speculated.labels(outcome) for outcome in ("accepted", "rejected"))
        for outcome in ("hit", "miss"):
            self._prefix_cache.labels(outcome)

    def describe_engine(self, info: EngineInfo) -> None:
        """Tells what is served, once it is known; only then can the experts' series exist."""
        self._experts = [expert["name"] for expert in info.experts]
        self._info.labels(info.model, info.dtype, info.device, info.versions.get("service", "")).set(1)
        for name in self._experts:
            self._weight.labels(name)
            self._top1.labels(name)
        if info.gate_profile is not None:
            self._create_drift(info.gate_profile)

    def observe_step(self, stats: StepStats) -> None:
        """Everything one step of the engine has to report; a report without rows was no step."""
        if stats.scaling_rows or stats.real_rows:
            self._step_seconds.observe(stats.step_seconds)
        self._scaling_rows.inc(stats.scaling_rows)
        self._real_rows.inc(stats.real_rows)
        self._draft_hits.inc(stats.draft_hits)
        self._draft_misses.inc(stats.draft_misses)
        self._accepted.inc(stats.accepted_tokens)
        self._rejected.inc(stats.speculated_tokens - stats.accepted_tokens)
        self._preemptions.inc(stats.preemptions)
        self._set_load(stats.requests_running, stats.requests_waiting)
        self._kv_used.set(stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0)
        self._observe_gate(stats.gate)
        if self._drift is not None:
            self._drift.observe(stats.gate)

    def observe_cache(self, cached_tokens: int, prompt_tokens: int) -> None:
        """How much of one request's prompt was found in the prefix cache."""
        self._prefix_cache.labels("hit").inc(cached_tokens)
        self._prefix_cache.labels("miss").inc(prompt_tokens - cached_tokens)

    def render(self) -> bytes:
        """The scrape output, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _create_drift(self, profile: Mapping[str, Any]) -> None:
        try:
            drift = self._drift = GateDrift(profile, self._experts)
        except ProfileError as error:
            logger.warning("no drift metrics: the bundle's gate_profile cannot be used: %s", error)
            return
        for distribution in DISTRIBUTIONS:
            self._psi.labels(distribution).set_function(partial(drift.index, distribution))

    def _set_load(self, running: int, waiting: int) -> None:
        self.running, self.waiting = running, waiting
        self._running.set(running)
        self._waiting.set(waiting)

    def _observe_gate(self, gate: GateStats) -> None:
        maximum = math.log(len(self._experts)) if len(self._experts) > 1 else math.inf  # the ratio is 0 for one expert
        for phase, raw in zip(PHASES, (gate.prompt_entropy, gate.generated_entropy), strict=True):
            if raw:
                entropy = np.frombuffer(raw, np.float32)
                self._entropy.observe(phase, entropy)
                self._entropy_ratio.observe(phase, entropy / maximum)
        for name, weight, top1 in zip(self._experts, gate.weight, gate.top1, strict=False):
            self._weight.labels(name).inc(weight)
            self._top1.labels(name).inc(top1)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"xlora_{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"xlora_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(f"xlora_{name}", documentation, registry=self.registry, buckets=bounds)
