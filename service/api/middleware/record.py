"""One request as it is remembered: its id, what it cost, how it ended; counted, logged and traced when it has ended.

Pure ASGI and outermost, so that whatever answers, a handler or a refusal, is seen here. No prompt, no text and no key
is ever in a record.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.contract.request import SamplingParams
from service.observability.metrics import Metrics

logger = logging.getLogger("xlora.request")

_RECORD_KEY = "xlora_record"  # in the ASGI scope
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The caller's span (W3C Trace Context)."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16
    sampled: bool

    @classmethod
    def parse(cls, header: str | None) -> TraceParent | None:
        """None for a header that is absent or malformed, as the standard wants it."""
        match = _TRACE_PARENT.fullmatch(header or "")
        if match is None or (match[4] and header is not None and header.startswith("00-")):
            return None
        return cls(match[1], match[2], bool(int(match[3], 16) & 1))


@dataclass(slots=True)
class RequestRecord:
    """Facts about one request, which its handler fills in; None is not known."""

    request_id: str
    method: str
    trace: TraceParent | None = None
    route: str = ""  # the path of the route that the router chooses (route_match.py); of none, or not yet known: ""
    started_ns: int = field(default_factory=time.time_ns)
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    outcome: str | None = None  # what a handler knows better than the status tells
    response_id: str | None = None
    model: str | None = None
    sampling: SamplingParams | None = None
    stream: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reasons: list[str | None] = field(default_factory=list)
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    total_seconds: float = 0.0
    gate_entropy_nats: float | None = None  # mean over the positions that produced tokens
    top_expert: str | None = None

    def finish(self) -> None:
        self.total_seconds = time.perf_counter() - self.started
        if self.outcome is None:
            self.outcome = _outcome(self.status)

    def fields(self) -> dict[str, object]:
        """The line of the log."""
        seconds = {"queue": self.queue_seconds, "first_token": self.first_token_seconds, "total": self.total_seconds}
        return {
            "request_id": self.request_id,
            "trace_id": None if self.trace is None else self.trace.trace_id,
            "response_id": self.response_id,
            "status": self.status,
            "outcome": self.outcome,
            "model": self.model,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "finish_reasons": self.finish_reasons or None,
            **{f"{name}_seconds": None if value is None else round(value, 6) for name, value in seconds.items()},
            "gate_entropy_nats": None if self.gate_entropy_nats is None else round(self.gate_entropy_nats, 4),
            "top_expert": self.top_expert,
        }


class SpanWriter(Protocol):
    """Where ended requests go besides the log (tracing.py)."""

    def write(self, record: RequestRecord) -> None:
        """Takes one ended request."""


class Recorder:
    """Gives every request an id, and counts, logs and traces those of some routes."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str], spans: Sequence[SpanWriter] = ()
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = endpoints
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        trace = TraceParent.parse(headers.get("traceparent"))
        record = scope[_RECORD_KEY] = RequestRecord(request_id, scope["method"], trace)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            record.finish()
            if record.route in self._endpoints:
                self._report(record)

    def _report(self, record: RequestRecord) -> None:
        self._metrics.requests.labels(record.route, record.outcome).inc()
        logger.info("%s %s", record.method, record.route, extra={"fields": record.fields()})
        for writer in self._spans:
            writer.write(record)


def request_id_of(headers: Headers) -> str:
    """The caller's id for a request, or a new one where there is none that could stand in a log."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that a handler or a response serves."""
    record = scope[_RECORD_KEY]
    assert isinstance(record, RequestRecord)
    return record


def _outcome(status: int) -> str:
    match status:
        case 0:
            return "cancelled"
        case 429 | 503:
            return "rejected"
        case 504:
            return "timeout"
    return "ok" if status < 400 else "invalid" if status < 500 else "error"
