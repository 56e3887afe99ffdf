"""What is remembered of a request: its id, a line in the log, a span; and what must not be in them."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.api.logs import JsonFormatter, TextFormatter
from service.api.middleware.record import TraceParent
from service.api.middleware.tracing import SpanExport
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.api.conftest import ThreadClient, wait_until_ready
from tests.support.fake_engine import EXPERTS, gate_row

SECRET = "xyzzy-plugh"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = {"prompt": SECRET, "max_tokens": 5, "temperature": 0.5, "seed": 3}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    formatter = JsonFormatter()
    return [json.loads(formatter.format(record)) for record in caplog.records if record.name == "xlora.request"]


def test_every_answer_has_an_id_and_a_given_one_is_kept(http: TestClient) -> None:
    assert http.get("/livez", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    generated = {http.post("/generate", content="{").headers["x-request-id"] for _ in range(2)}
    assert len(generated) == 2
    for bad in ("a" * 129, "with space", '"quoted"'):
        assert http.get("/livez", headers={"X-Request-Id": bad}).headers["x-request-id"].startswith("req-")


def test_one_line_per_request(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = http.post("/v1/completions", json=BODY, headers={"traceparent": TRACE, "X-Request-Id": "r1"}).json()
    http.post("/generate", json={"prompt": SECRET, "nonsense": 1})
    http.get("/livez")
    good, bad = lines(caplog)
    assert (good["message"], good["status"], good["outcome"], good["level"]) == (
        "POST /v1/completions",
        200,
        "ok",
        "info",
    )
    assert (good["request_id"], good["response_id"], good["model"]) == ("r1", answer["id"], "fake")
    assert good["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    prompt = answer["usage"]["prompt_tokens"]
    assert (good["prompt_tokens"], good["completion_tokens"], good["finish_reasons"]) == (prompt, 5, ["length"])
    assert 0 <= good["queue_seconds"] <= good["first_token_seconds"] <= good["total_seconds"]
    rows = [gate_row(position) for position in range(prompt - 1, prompt + 4)]
    entropies = [float(-(row * np.log(row)).sum(1).mean()) for row in rows if row.any()]
    assert good["gate_entropy_nats"] == pytest.approx(np.mean(entropies), abs=1e-4)
    assert good["top_expert"] == EXPERTS[int(np.sum(rows, axis=(0, 1)).argmax())]
    assert (bad["status"], bad["outcome"], bad["completion_tokens"]) == (400, "invalid", None)


def test_what_can_never_be_served_takes_no_place(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused before it is admitted, which gives it a name."""
    caplog.set_level(logging.INFO)
    steered = {"gate": {"top_k": 9}}
    for path, more in (
        ("/generate", steered),
        ("/v1/completions", {"xlora": steered}),
        ("/compare", {"settings": [{}, steered]}),
    ):
        assert http.post(path, json=BODY | more).status_code == 400
    assert http.post("/scalings", json={"prompt": SECRET, "select": {"start": 90}}).status_code == 400
    names = [(line.get("response_id"), line.get("model"), line.get("prompt_tokens")) for line in lines(caplog)]
    assert names == [(None, None, None)] * 4


def test_no_prompt_is_in_the_log(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for body in (BODY, BODY | {"stream": True}, BODY | {"seed": SECRET}, BODY | {SECRET: 1}):
        http.post("/generate", json=body)
    http.post("/generate", content=SECRET, headers={"Authorization": f"Bearer {SECRET}"})
    assert SECRET not in caplog.text
    assert SECRET not in "".join(json.dumps(line) for line in lines(caplog))


def test_a_line_for_people_leaves_out_what_is_not_known() -> None:
    record = logging.makeLogRecord(
        {"name": "n", "msg": "m", "levelname": "INFO", "fields": {"a": 1, "b": None, "c": "d"}}
    )
    assert TextFormatter().format(record).endswith('INFO n: m a=1 c="d"')


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "00-short-b7ad6b7169203331-01", TRACE.upper(), TRACE + "-x", "ff" + TRACE[2:]),
        *(f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{'1' * 32}-{'0' * 16}-01"),
    ],
)
def test_a_malformed_trace_is_no_trace(header: str | None) -> None:
    assert TraceParent.parse(header) is None


def test_spans(client: ThreadClient) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(client, Settings(), Metrics(CollectorRegistry()), spans=[SpanExport(provider)])
    with TestClient(app) as http:
        wait_until_ready(http)
        answer = http.post("/v1/completions", json=BODY, headers={"traceparent": TRACE}).json()
        http.post("/v1/chat/completions", json={"messages": []})
    good, bad = exporter.get_finished_spans()
    assert good.name == "text_completion fake"
    assert good.parent is not None
    assert f"{good.context.trace_id:032x}-{good.parent.span_id:016x}" == TRACE[3:-3]
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "xlora.outcome": "ok",
    }
    assert good.attributes is not None
    assert expected.items() <= dict(good.attributes).items()
    assert SECRET not in good.to_json()
    assert good.end_time is not None
    assert good.start_time is not None
    assert 0 < good.end_time - good.start_time < 60e9
    assert (bad.name, bad.attributes["http.response.status_code"]) == ("POST /v1/chat/completions", 400)
