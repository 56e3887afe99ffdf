"""The application over a fake engine: the real client and worker, the worker in a thread."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.openapi.utils import get_openapi
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.client.engine_client import EngineClient
from service.contract.options import EngineOptions
from service.engine.worker import Worker
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.fake_engine import FakeEngine, fake_info, write_bundle
from tests.support.waiting import wait_for


class ThreadClient(EngineClient):
    """EngineClient whose worker is a thread of this process: tests can look at its engine."""

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__()
        self.engine = engine
        self.release = threading.Event()  # clear it to hold the loading
        self.release.set()

    async def start(self, options: EngineOptions, on_progress: object) -> None:
        ours, theirs = socket.socketpair()

        def work() -> None:
            with theirs:
                Worker(theirs, self._load).run()

        threading.Thread(target=work, daemon=True).start()
        await self.connect(ours, options, on_progress)  # type: ignore[arg-type]

    def _load(self, options: EngineOptions, on_progress: object, on_lost: object) -> FakeEngine:
        self.release.wait()
        return self.engine


@pytest.fixture(autouse=True, scope="session")
def one_document() -> Iterator[None]:
    """FastAPI takes half a second for an application's OpenAPI document, and it is the same for every one, which
    test_ops.py checks: it is made once, and each application finishes a copy of its own.
    """
    made: list[bytes] = []

    def copy_of_the_first(**given: Any) -> Any:
        if not made:
            made.append(pickle.dumps(get_openapi(**given)))
        return pickle.loads(made[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastapi.applications.get_openapi", copy_of_the_first)
        yield


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(fake_info(write_bundle(tmp_path)))


@pytest.fixture
def client(engine: FakeEngine) -> ThreadClient:
    return ThreadClient(engine)


@contextmanager
def serving(client: ThreadClient, **settings: Any) -> Iterator[TestClient]:
    """The application with some settings, ready."""
    app = create_app(client, Settings(**{"max_body_bytes": 64 * 1024, **settings}), Metrics(CollectorRegistry()))
    with TestClient(app, raise_server_exceptions=False) as http:
        wait_until_ready(http)
        yield http


@pytest.fixture
def http(client: ThreadClient) -> Iterator[TestClient]:
    with serving(client) as http:
        yield http


def wait_until_ready(http: TestClient) -> None:
    assert wait_for(lambda: http.get("/readyz").status_code == 200)
