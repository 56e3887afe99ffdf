"""Probes, /info, the tokenizer's routes, and the OpenAPI document."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

from fastapi.openapi.utils import get_openapi
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.api.conftest import ThreadClient, wait_until_ready
from tests.api.test_errors import error_of
from tests.support.fake_engine import EXPERTS, SITES


def test_alive_at_once_and_ready_after_the_warm_up(client: ThreadClient) -> None:
    client.release.clear()
    with TestClient(create_app(client, Settings(), Metrics(CollectorRegistry()))) as http:
        assert (http.get("/livez").status_code, http.get("/readyz").status_code) == (200, 503)
        assert http.get("/health").json()["status"] == "loading"
        for path in ("/generate", "/scalings"):
            refused = http.post(path, json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert http.get("/info").status_code == 503
        assert http.get("/metrics").status_code == 200
        client.release.set()
        wait_until_ready(http)
        assert client.engine.steps >= 4, "ready before a warm-up generation"
        health = http.get("/health").json()
        assert (health["status"], health["model"], health["requests_running"]) == ("ok", "fake", 0)
    assert not client.alive


def test_a_failed_load_is_kept_for_the_command_line(client: ThreadClient) -> None:
    client._load = lambda *_: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    app = create_app(client, Settings(), Metrics(CollectorRegistry()))
    with TestClient(app) as http:
        while app.state.service.error is None:
            assert http.get("/readyz").status_code == 503
        assert http.get("/livez").status_code == 503
    assert "ZeroDivisionError" in str(app.state.service.error)


def test_load_balancers_may_ask_with_head(client: ThreadClient) -> None:
    """The status of the GET, without its body; other routes still refuse it."""
    client.release.clear()
    with TestClient(create_app(client, Settings(), Metrics(CollectorRegistry()))) as http:
        assert [http.head(path).status_code for path in ("/livez", "/readyz", "/health")] == [200, 503, 200]
        client.release.set()
        wait_until_ready(http)
        assert http.head("/readyz").status_code == 200
        assert http.head("/generate").status_code == 405


def test_info(http: TestClient) -> None:
    info = http.get("/info").json()
    assert [expert["name"] for expert in info["experts"]] == EXPERTS
    assert (info["n_classes"], info["n_layers"], info["sites"]) == (3, 2, SITES)
    assert info["limits"]["max_model_len"] == 96
    assert len(info["dummy_row"]) == 2
    assert (info["draft_head"], info["draft_layer"]) == (None, None)


def test_info_tells_of_the_draft_layer(client: ThreadClient) -> None:
    client.engine.info = replace(client.engine.info, draft_layer=[0.95, 0.85, 0.75])
    with TestClient(create_app(client, Settings(), Metrics(CollectorRegistry()))) as http:
        wait_until_ready(http)
        assert http.get("/info").json()["draft_layer"] == {"depth": 3, "agreement": [0.95, 0.85, 0.75]}
        assert 'xlora_draft_tokens_total{depth="3",outcome="kept",source="lookahead"} 0.0' in http.get("/metrics").text


def test_tokenize_and_back(http: TestClient) -> None:
    answer = http.post("/tokenize", json={"text": "naïve 🙂"}).json()
    assert "".join(token["text"] for token in answer["tokens"]) == "naïve 🙂"
    assert answer["count"] == len(answer["token_ids"])
    assert http.post("/detokenize", json={"token_ids": answer["token_ids"]}).json() == {"text": "naïve 🙂"}
    assert http.post("/tokenize", json={"text": ""}).json()["token_ids"] == []
    assert http.post("/detokenize", json={"token_ids": [999]}).status_code == 400


def test_tokens_of_a_conversation(http: TestClient) -> None:
    """As a chat's route has them written; text and messages exclude each other."""
    messages = [{"role": "user", "content": "naïve"}]
    answer = http.post("/tokenize", json={"messages": messages}).json()
    assert "".join(token["text"] for token in answer["tokens"]) == "<user>naïve"
    chat = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == answer["count"]
    for wrong in ({}, {"text": "a", "messages": messages}, {"messages": messages, "add_special_tokens": True}):
        assert error_of(http.post("/tokenize", json=wrong), 400)["code"] == "invalid_request", wrong


def test_every_route_documents_examples_and_errors(http: TestClient) -> None:
    document: dict[str, Any] = http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        *("/generate", "/scalings", "/livez", "/readyz", "/health", "/metrics", "/info", "/tokenize", "/detokenize"),
        *("/compare", "/gate", "/scalings/log", "/scalings/log.npz"),
        *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}"),
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            assert "422" not in operation["responses"], path
            if "requestBody" in operation:
                assert operation["requestBody"]["content"]["application/json"]["examples"]
                assert {"400", "413", "503"} <= set(operation["responses"])
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_settings_change_nothing_that_fastapi_documents(client: ThreadClient) -> None:
    """What the fixture one_document relies on: two applications, as different as settings make them."""
    other = Settings(cors_origins="*", api_keys="user-key-1", admin_keys="admin-key-1", max_num_seqs=3)
    apps = [create_app(client, settings, Metrics(CollectorRegistry())) for settings in (Settings(), other)]
    first, second = (get_openapi(title="", version="", routes=app.routes) for app in apps)
    assert first == second
    assert first["paths"].keys() == apps[0].openapi()["paths"].keys()


def test_documented_examples_are_accepted(http: TestClient) -> None:
    for path, operations in http.get("/openapi.json").json()["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, example in body.get("examples", {}).items():
            value = example["value"] | ({"token_ids": [1]} if path == "/detokenize" else {})
            if "model" in value:
                value["model"] = "fake"
            assert http.post(path, json=value).status_code == 200, (path, name)


def test_the_api_process_has_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from service.api.app import create_app; from service.client.engine_client import EngineClient;"
        "from service.observability.metrics import Metrics; from service.settings import Settings;"
        "import prometheus_client as p, service.commands.serve;"
        "create_app(EngineClient(), Settings(), Metrics(p.CollectorRegistry()));"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
