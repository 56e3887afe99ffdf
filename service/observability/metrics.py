"""Every metric of the service, on a registry of the caller's choice. A leaf: no torch, no engine, no HTTP.

Names start with xlora_, units are base units, labels have few values (experts, endpoints, outcomes; never a request).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from service.contract.output import DraftCounts
from service.observability.drafts import DraftCounters
from service.observability.drift import DISTRIBUTIONS, PHASES, GateDrift, ProfileError
from service.observability.resources import Resources

if TYPE_CHECKING:
    from service.contract.engine_info import EngineInfo
    from service.contract.output import GateStats, StepStats

STATES = ("ok", "loading", "draining", "stalled", "engine dead")

# From a demo's milliseconds on a CPU to answers of --request-timeout's 600 s by a 7B model.
_LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 1.0, 2.5, 5.0, 10.0),  # a person reads 5 to 10 tokens a second
)
_STEP_SECONDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    *(5.0, 10.0, 30.0, 60.0),  # a chunk of a long prompt in a 7B model on a CPU
)
_ENTROPY_NATS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
_RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 21))

_MAX_PENDING = 1024  # steps, or gaps between tokens

logger = logging.getLogger("xlora.metrics")


class ArrayHistogram(Collector):
    """A histogram that observes whole arrays at once, at the cost of one observation."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float], *labels: str) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._bounds = np.array(bounds)
        self._counts: dict[tuple[str, ...], npt.NDArray[np.int64]] = {}  # by label values
        self._sums: dict[tuple[str, ...], float] = {}

    def observe(self, values: npt.NDArray[np.floating], *label_values: str) -> None:
        """Adds every finite value; NaN (a position without a gate) is not an observation."""
        finite = values[np.isfinite(values)]
        buckets = np.bincount(np.searchsorted(self._bounds, finite), minlength=len(self._bounds) + 1)
        self._counts[label_values] = self._counts.get(label_values, 0) + buckets
        self._sums[label_values] = self._sums.get(label_values, 0.0) + float(finite.sum(dtype=np.float64))

    def describe(self) -> Iterable[Metric]:
        """The metrics without values, which the registry checks for name clashes."""
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        bounds = [*(str(bound) for bound in self._bounds.tolist()), "+Inf"]
        for values, counts in self._counts.items():
            cumulated = [(bound, float(count)) for bound, count in zip(bounds, counts.cumsum(), strict=True)]
            family.add_metric(values, buckets=cumulated, sum_value=self._sums[values])
        yield family


class _BeforeScrape(Collector):
    """Has no metrics; registered first, it is asked first."""

    def __init__(self, fold: Callable[[], None]) -> None:
        self._fold = fold

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        """Brings the others up to date."""
        self._fold()
        return ()


@dataclass(slots=True)
class _Pending:
    """Counts of steps and tokens since the metrics were last updated."""

    step_seconds: list[float] = field(default_factory=list)
    scaling_rows: int = 0
    real_rows: int = 0
    drafts: DraftCounts = field(default_factory=DraftCounts)
    preemptions: int = 0
    gates: list[GateStats] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0  # of the sequences that generate them
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens of one choice
    cached_tokens: int = 0  # of prompts
    computed_tokens: int = 0


class Metrics:
    """The service's metrics. `observe_step` is called once per engine step, the rest by the request handlers.

    What comes often is only added up, and told to Prometheus many at once: a call of its objects costs ten times as
    much between two steps, where nothing of it is in the caches.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.running = 0  # of the last step, for /health
        self.waiting = 0
        self._kv_used_ratio = 0.0
        self._experts: list[str] = []
        self._drift: GateDrift | None = None  # None: the bundle has no profile
        self._pending = _Pending()
        self.resources = Resources()
        registry.register(self.resources)
        # They are a series more for each counter, which no query reads. There is no finer switch.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry.register(_BeforeScrape(self._fold))
        self._create_gate()
        self._create_requests()
        self._create_engine()
        self._create_service()

    def _create_service(self) -> None:
        self._state = self._gauge("state", "1 for what the service says of itself in /health, 0 for the rest.", "state")
        self._wanted = self._gauge("replicas_wanted", "How many replicas there should be (--wanted-replicas).")

    def watch(self, state: Callable[[], str], wanted_replicas: int) -> None:
        """Shows a state, one of STATES, as it is at each scrape."""

        def is_now(name: str) -> float:
            return float(state() == name)

        for name in STATES:
            self._state.labels(name).set_function(partial(is_now, name))
        self._wanted.set(wanted_replicas)

    def _create_gate(self) -> None:
        self._entropy = self._array_histogram(
            "gate_entropy_nats",
            "Entropy of the gate, mean over sites, one observation per position.",
            _ENTROPY_NATS,
            "phase",
        )
        self._entropy_ratio = self._array_histogram(
            "gate_entropy_ratio", "Entropy of the gate over its maximum, ln(number of experts).", _RATIOS, "phase"
        )
        for phase in PHASES:
            self._entropy.observe(np.empty(0), phase)
            self._entropy_ratio.observe(np.empty(0), phase)
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
        self._inter_token_latency = self._array_histogram(
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
        self._generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self._forwards = self._counter(
            "sequence_forwards",
            "Forward passes that generating sequences took part in, prompts included; a pass counts once for each.",
        )
        self._prefix_cache = self._counter(
            "prefix_cache_tokens", "Prompt tokens whose keys and values were found (hit) or computed (miss).", "outcome"
        )

    def _create_engine(self) -> None:
        self._step_seconds = self._array_histogram("step_seconds", "One step of the engine.", _STEP_SECONDS)
        self._rows = self._counter("rows", "Rows computed, by stream.", "stream")
        self._drafts = DraftCounters(self._counter)
        self._preemptions = self._counter("preemptions", "Sequences set back because the KV pool was full.")
        running = self._gauge("requests_running", "Sequences being worked on.")
        running.set_function(lambda: self.running)
        waiting = self._gauge("requests_waiting", "Sequences waiting for their first step.")
        waiting.set_function(lambda: self.waiting)
        kv_used = self._gauge("kv_blocks_used_ratio", "Share of the KV pool in use.")
        kv_used.set_function(lambda: self._kv_used_ratio)
        self._info = self._gauge(
            "info", "Always 1; the labels say what is served.", "model", "dtype", "device", "version"
        )
        self._scaling_rows, self._real_rows = (self._rows.labels(stream) for stream in ("scaling", "real"))
        self._cached, self._computed = (self._prefix_cache.labels(outcome) for outcome in ("hit", "miss"))

    def describe_engine(self, info: EngineInfo) -> None:
        """Tells what is served, once it is known; only then can the experts' series exist."""
        self._experts = [expert["name"] for expert in info.experts]
        self._info.labels(info.model, info.dtype, info.device, info.versions.get("service", "")).set(1)
        for name in self._experts:
            self._weight.labels(name)
            self._top1.labels(name)
        self._drafts.expect(max(1, len(info.draft_layer)))
        if info.gate_profile is not None:
            self._create_drift(info.gate_profile)

    def observe_step(self, stats: StepStats) -> None:
        """Everything one step of the engine has to report; a report without rows was no step."""
        pending = self._pending
        if stats.scaling_rows or stats.real_rows:
            pending.step_seconds.append(stats.step_seconds)
        pending.scaling_rows += stats.scaling_rows
        pending.real_rows += stats.real_rows
        pending.drafts.add(stats.drafts)
        pending.preemptions += stats.preemptions
        if stats.gate.weight and all(map(math.isfinite, stats.gate.weight)):  # a counter would keep NaN for good
            pending.gates.append(stats.gate)
        self.running, self.waiting = stats.requests_running, stats.requests_waiting
        self._kv_used_ratio = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        if len(pending.step_seconds) >= _MAX_PENDING:
            self._fold()

    def observe_tokens(self, tokens: int, gaps: Sequence[float], forwards: int = 0) -> None:
        """Tokens of one call that came together, seconds since the ones before them, of those that had one, and the
        forwards that their sequences have taken part in meanwhile.
        """
        pending = self._pending
        pending.tokens += tokens
        pending.forwards += forwards
        pending.gaps += gaps
        if len(pending.gaps) >= _MAX_PENDING:
            self._fold()

    def observe_cache(self, cached_tokens: int, prompt_tokens: int) -> None:
        """How much of one request's prompt was found in the prefix cache."""
        self._pending.cached_tokens += cached_tokens
        self._pending.computed_tokens += prompt_tokens - cached_tokens

    def render(self) -> bytes:
        """The scrape output, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _fold(self) -> None:
        """Tells Prometheus' objects what has been added up."""
        pending, self._pending = self._pending, _Pending()
        self._step_seconds.observe(np.array(pending.step_seconds))
        self._inter_token_latency.observe(np.array(pending.gaps))
        self._scaling_rows.inc(pending.scaling_rows)
        self._real_rows.inc(pending.real_rows)
        self._drafts.count(pending.drafts)
        self._preemptions.inc(pending.preemptions)
        self._generated_tokens.inc(pending.tokens)
        self._forwards.inc(pending.forwards)
        self._cached.inc(pending.cached_tokens)
        self._computed.inc(pending.computed_tokens)
        if pending.gates:
            self._observe_gates(pending.gates)

    def _create_drift(self, profile: Mapping[str, Any]) -> None:
        try:
            drift = self._drift = GateDrift(profile, self._experts)
        except ProfileError as error:
            logger.warning("there are no drift metrics, because the bundle's gate_profile cannot be used: %s", error)
            return
        for distribution in DISTRIBUTIONS:
            self._psi.labels(distribution).set_function(partial(drift.index, distribution))

    def _observe_gates(self, gates: Sequence[GateStats]) -> None:
        maximum = math.log(len(self._experts)) if len(self._experts) > 1 else math.inf  # the ratio is 0 for one expert
        prompt = b"".join(gate.prompt_entropy for gate in gates)
        generated = b"".join(gate.generated_entropy for gate in gates)
        for phase, raw in zip(PHASES, (prompt, generated), strict=True):
            entropy = np.frombuffer(raw, np.float32)
            self._entropy.observe(entropy, phase)
            self._entropy_ratio.observe(entropy / maximum, phase)
        weight = np.sum([gate.weight for gate in gates], axis=0).tolist()
        top1 = np.sum([gate.top1 for gate in gates], axis=0).tolist()
        for name, share, leads in zip(self._experts, weight, top1, strict=False):
            self._weight.labels(name).inc(share)
            self._top1.labels(name).inc(leads)
        if self._drift is not None:
            for gate in gates:
                self._drift.observe(gate)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"xlora_{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"xlora_{name}", documentation, labels, registry=self.registry)

    def _array_histogram(self, name: str, documentation: str, bounds: Sequence[float], *labels: str) -> ArrayHistogram:
        created = ArrayHistogram(f"xlora_{name}", documentation, bounds, *labels)
        self.registry.register(created)
        return created

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(f"xlora_{name}", documentation, registry=self.registry, buckets=bounds)
