"""Ended requests as OpenTelemetry spans with the `gen_ai.*` attributes. Needs the extra `otel`.

A span is made once, from a finished record, with the times it had: nothing of OpenTelemetry runs while tokens flow.
"""

from __future__ import annotations

import importlib
from typing import Any

from service import __version__
from service.api.middleware.record import RequestRecord
from service.contract.errors import StartupError

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/generate": "text_completion"}
_NANOSECONDS = 1_000_000_000


class SpanExport:
    """Writes records as spans through any OpenTelemetry exporter."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("xlora-service", __version__)
        self._api = importlib.import_module("opentelemetry.trace")

    @classmethod
    def to(cls, endpoint: str) -> SpanExport:
        """Sends spans in batches over HTTP. Raises StartupError where the extra is not installed."""
        try:
            exporter = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            sdk = importlib.import_module("opentelemetry.sdk.trace")
            batches = importlib.import_module("opentelemetry.sdk.trace.export")
            resources = importlib.import_module("opentelemetry.sdk.resources")
        except ImportError:
            raise StartupError(
                "--otlp-endpoint needs OpenTelemetry", hint="pip install 'xlora-service[otel]'"
            ) from None
        resource = resources.Resource.create({"service.name": "xlora-service", "service.version": __version__})
        provider = sdk.TracerProvider(resource=resource)
        provider.add_span_processor(batches.BatchSpanProcessor(exporter.OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def write(self, record: RequestRecord) -> None:
        """One ended request as one span, a child of the caller's."""
        operation = _OPERATIONS.get(record.route)
        name = f"{operation} {record.model}" if operation and record.model else f"{record.method} {record.route}"
        span = self._tracer.start_span(
            name,
            context=self._parent(record),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes(record),
            start_time=record.started_ns,
        )
        if record.outcome in ("error", "timeout"):
            span.set_status(self._api.StatusCode.ERROR)
        span.end(record.started_ns + int(record.total_seconds * _NANOSECONDS))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()

    def _parent(self, record: RequestRecord) -> Any:
        if record.trace is None:
            return None
        context = self._api.SpanContext(
            trace_id=int(record.trace.trace_id, 16),
            span_id=int(record.trace.span_id, 16),
            is_remote=True,
            trace_flags=self._api.TraceFlags(int(record.trace.sampled)),
        )
        return self._api.set_span_in_context(self._api.NonRecordingSpan(context))


def attributes(record: RequestRecord) -> dict[str, Any]:
    """The record under OpenTelemetry's names where it has one; never a prompt or an answer."""
    sampling = record.sampling
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.route,
        "gen_ai.operation.name": _OPERATIONS.get(record.route),
        "gen_ai.provider.name": "xlora",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.finish_reasons": [reason for reason in record.finish_reasons if reason] or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "xlora.request_id": record.request_id,
        "xlora.outcome": record.outcome,
        "xlora.queue_seconds": record.queue_seconds,
        "xlora.time_to_first_token_seconds": record.first_token_seconds,
        "xlora.gate.entropy_nats": record.gate_entropy_nats,
        "xlora.gate.top_expert": record.top_expert,
    }
    if sampling is not None:
        for name in ("max_tokens", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed"):
            found[f"gen_ai.request.{name}"] = getattr(sampling, name)
        found["gen_ai.request.choice.count"] = sampling.n
    return {name: value for name, value in found.items() if value is not None}
