"""Memory, CPU time and descriptors of the service's processes, and the state of its GPUs, as a collector of metrics.

    process     what it is
    api         this process: HTTP and text
    engine      the model, and rank 0 of a tensor-parallel group
    rank 1 ..   the other ranks
    helpers     what may have to be killed (chat templates, grammars), together

Processes are found by their command lines, among the children of this one. Everything is read in a thread of its own,
every few seconds: on a large machine, or with a driver in trouble, it takes too long for the event loop. A reading that
has grown old is not shown.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psutil
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.observability.gpus import Gpu, Gpus

HELPERS = "helpers"
_READ_EVERY_SECONDS = 5.0
_OLD_SECONDS = 30.0
_ENGINE = "service.engine.worker"
_RANK = "service.engine.tensor_parallel.rank_worker"

logger = logging.getLogger("xlora.metrics")


@dataclass
class Usage:
    """The resources of one process, or of several of one role together."""

    resident_bytes: int = 0
    cpu_seconds: float = 0.0
    open_fds: int = 0
    max_fds: float = math.nan
    started_at: float = math.nan  # seconds since 1970


@dataclass
class Reading:
    """Everything at one moment."""

    at: float  # on the monotonic clock
    processes: dict[str, Usage] = field(default_factory=dict)  # by role
    gpus: list[Gpu] = field(default_factory=list)


class Resources(Collector):
    """The latest reading. Nothing is shown before `start`."""

    def __init__(self, gpus: Callable[[], Gpus] = Gpus) -> None:
        self._make_gpus = gpus
        self._own = psutil.Process()
        self._known: dict[int, psutil.Process] = {}  # by pid
        self._helper_seconds = 0.0  # CPU time of all helpers so far, which may not fall
        self._reading: Reading | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        """Begins to read; in a daemon thread, which a driver that never answers cannot keep the process alive by."""
        threading.Thread(target=self._run, name="resources", daemon=True).start()

    def stop(self) -> None:
        """No more readings."""
        self._stop.set()

    def read(self, gpus: Gpus) -> None:
        self._reading = Reading(time.monotonic(), self._read_processes(), gpus.read())

    def describe(self) -> Iterable[Metric]:
        return _families(Reading(0.0))

    def collect(self) -> Iterable[Metric]:
        """The metrics of a scrape: none where there is no fresh reading."""
        reading = self._reading
        return [] if reading is None or time.monotonic() - reading.at > _OLD_SECONDS else _families(reading)

    def _run(self) -> None:
        gpus = self._make_gpus()
        while True:
            try:
                self.read(gpus)
            except OSError as error:  # as where descriptors have run out
                logger.warning("the processes' resources could not be read: %s", error)
            except Exception:
                logger.exception("the processes' resources could not be read")
            if self._stop.wait(_READ_EVERY_SECONDS):
                return

    def _read_processes(self) -> dict[str, Usage]:
        processes, helpers = {"api": _usage(self._own)}, Usage()
        ended = self._own.cpu_times()  # of children: without it the sum over helpers would fall when one ends
        helpers.cpu_seconds = getattr(ended, "children_user", 0.0) + getattr(ended, "children_system", 0.0)
        for process in self._children():
            try:
                role, usage = _role(process), _usage(process)
            except psutil.Error:  # it has ended
                continue
            if role == HELPERS:
                helpers.resident_bytes += usage.resident_bytes
                helpers.cpu_seconds += usage.cpu_seconds
                helpers.open_fds += usage.open_fds
            else:  # the first one: a child of it that was just started has its command line for a moment
                processes.setdefault(role, usage)
        # One that has ended is counted with this process' children only when somebody has waited for it.
        self._helper_seconds = helpers.cpu_seconds = max(self._helper_seconds, helpers.cpu_seconds)
        return processes | {HELPERS: helpers}

    def _children(self) -> Iterable[psutil.Process]:
        """Those that live, each as the object that was first seen of it: that one's start time never changes."""
        children = self._own.children(recursive=True)
        self._known = {
            child.pid: known if (known := self._known.get(child.pid)) == child else child for child in children
        }
        return self._known.values()


def _role(process: psutil.Process) -> str:
    """Found anew each time: a process that was just started has its parent's command line for a moment."""
    line = process.cmdline()
    if _ENGINE in line:
        return "engine"
    return f"rank {line[-1]}" if _RANK in line else HELPERS


def _usage(process: psutil.Process) -> Usage:
    with process.oneshot():
        cpu = process.cpu_times()
        return Usage(
            process.memory_info().rss,
            cpu.user + cpu.system,
            process.num_fds(),
            process.rlimit(psutil.RLIMIT_NOFILE)[0] if sys.platform == "linux" else math.nan,
            process.create_time(),
        )


def _families(reading: Reading) -> list[Metric]:
    memory = GaugeMetricFamily(
        "xlora_process_resident_memory_bytes",
        "Memory that a process has, with what it shares with others.",
        labels=["process"],
    )
    cpu = CounterMetricFamily("xlora_process_cpu_seconds", "Time on CPUs, user and system.", labels=["process"])
    opened = GaugeMetricFamily("xlora_process_open_fds", "Descriptors that are open.", labels=["process"])
    most = GaugeMetricFamily("xlora_process_max_fds", "Descriptors that may be open.", labels=["process"])
    started = GaugeMetricFamily(
        "xlora_process_start_time_seconds", "When the process was started, since 1970.", labels=["process"]
    )
    for role, usage in reading.processes.items():
        memory.add_metric([role], usage.resident_bytes)
        cpu.add_metric([role], usage.cpu_seconds)
        opened.add_metric([role], usage.open_fds)
        if role != HELPERS:
            most.add_metric([role], usage.max_fds)
            started.add_metric([role], usage.started_at)
    return [memory, cpu, opened, most, started, *_gpu_families(reading.gpus)]


def _gpu_families(gpus: Iterable[Gpu]) -> list[Metric]:
    labels = ["gpu", "uuid", "name"]
    used = GaugeMetricFamily("xlora_gpu_memory_used_bytes", "Memory in use, by whomever.", labels=labels)
    total = GaugeMetricFamily("xlora_gpu_memory_total_bytes", "Memory of the GPU.", labels=labels)
    busy = GaugeMetricFamily(
        "xlora_gpu_utilization_ratio", "Share of the last moment in which the GPU computed something.", labels=labels
    )
    for gpu in gpus:
        values = [str(gpu.index), gpu.uuid, gpu.name]
        used.add_metric(values, gpu.used_bytes)
        total.add_metric(values, gpu.total_bytes)
        if gpu.busy_ratio is not None:
            busy.add_metric(values, gpu.busy_ratio)
    return [used, total, busy]
