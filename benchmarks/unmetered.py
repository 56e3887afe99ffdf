"""The server with its metrics switched off, for observability.py: `python -m benchmarks.unmetered serve ...`.

The API process observes nothing, and the engine's process summarises no gate rows that nobody asked for. Everything
else is the product's own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from service.cli import main
from service.client.engine_client import EngineClient
from service.commands import serve
from service.contract.options import EngineOptions
from service.observability.metrics import Metrics


def load_engine(options: EngineOptions, on_progress: Callable[[str], None], on_lost: Callable[[str], None]) -> Any:
    """The product's engine, whose gate statistics are never made."""
    from service.engine import loader
    from service.engine.gate import report

    reporter: Any = report.GateReporter
    read = reporter._read

    def read_for_those_who_asked(self: Any, spans: Any, copies: Any) -> Any:
        if any(span.sequence.request.return_scalings != "none" for span in spans):
            return read(self, spans, copies)
        for span in spans:
            span.sequence.reported = min(span.start + span.count, span.sequence.final)
        return []

    reporter._read = read_for_those_who_asked
    return loader.load_engine(options, on_progress, on_lost)


def switch_off() -> None:
    """In the API process."""
    metrics: Any = (Counter, Gauge, Histogram, Metrics)
    counter, gauge, histogram, ours = metrics
    counter.inc = gauge.set = histogram.observe = lambda *_: None
    ours.observe_step = ours.observe_tokens = ours.observe_cache = lambda *_: None
    client: Any = functools.partial(EngineClient, "benchmarks.unmetered:load_engine")
    serve.EngineClient = client  # type: ignore[misc]


if __name__ == "__main__":
    switch_off()
    sys.exit(main())
