"""The server with clocks around what it observes, for observability.py: `python -m benchmarks.timed serve ...`.

Both processes add up the CPU time of their thread in everything that feeds the metrics, in 8 bytes each of the file
that the variable BENCHMARK_CLOCKS names. In the engine that is the whole report of a step, with the reading of rows.
What a clock shows when nothing happens between two looks is taken off every time.
"""

from __future__ import annotations

import functools
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from service.cli import main
from service.client.engine_client import EngineClient
from service.commands import serve
from service.contract.options import EngineOptions
from service.observability.metrics import Metrics

VARIABLE = "BENCHMARK_CLOCKS"
_API, _ENGINE = 0, 1


class Clocks:
    """Seconds of both processes, in a file that others read."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._seconds = memoryview(mmap.mmap(file.fileno(), 16)).cast("d")
        self._running = False
        self._nothing = statistics.median(-(time.thread_time() - time.thread_time()) for _ in range(2001))

    @staticmethod
    def create(path: Path) -> Clocks:
        """At zero."""
        path.write_bytes(bytes(16))
        return Clocks(path)

    @property
    def total(self) -> float:
        """Of both."""
        return self._seconds[_API] + self._seconds[_ENGINE]

    def around(self, function: Callable[..., Any], which: int) -> Callable[..., Any]:
        """The function, timed unless it is called by another that is."""

        def timed(*arguments: Any, **more: Any) -> Any:
            if self._running:
                return function(*arguments, **more)
            self._running = True
            started = time.thread_time()
            try:
                return function(*arguments, **more)
            finally:
                self._seconds[which] += time.thread_time() - started - self._nothing
                self._running = False

        return timed


def load_engine(options: EngineOptions, on_progress: Callable[[str], None], on_lost: Callable[[str], None]) -> Any:
    """The product's engine, with a clock around its reports."""
    from service.engine import loader
    from service.engine.gate.report import GateReporter

    clocks = Clocks(Path(os.environ[VARIABLE]))
    reporter: Any = GateReporter
    for name in ("launch", "keep_final", "report", "log", "flush"):
        setattr(reporter, name, clocks.around(getattr(reporter, name), _ENGINE))
    return loader.load_engine(options, on_progress, on_lost)


def time_metrics() -> None:
    """In the API process."""
    clocks = Clocks(Path(os.environ[VARIABLE]))
    methods: list[tuple[Any, str]] = [(Counter, "inc"), (Gauge, "set"), (Histogram, "observe")]
    methods += [(Metrics, name) for name in ("observe_step", "observe_tokens", "observe_cache")]
    for owner, name in methods:
        setattr(owner, name, clocks.around(getattr(owner, name), _API))
    client: Any = functools.partial(EngineClient, "benchmarks.timed:load_engine")
    serve.EngineClient = client  # type: ignore[misc]


if __name__ == "__main__":
    time_metrics()
    sys.exit(main())
