"""XLora over a fake engine in a process of its own, and over a small real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service import XLora
from service.client.engine_client import EngineClient
from service.library import session
from tests.support.fake_engine import write_bundle

FAKE = "tests.support.fake_engine:load_engine"
SLOW = "tests.support.fake_engine:load_slow_engine"


@pytest.fixture
def open_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., XLora]]:
    """Opens models with a fake engine, at some speed, and closes them in the end."""
    opened: list[XLora] = []

    def open_model(loader: str = FAKE, **settings: object) -> XLora:
        monkeypatch.setattr(session, "EngineClient", lambda **given: EngineClient(loader, **given))
        opened.append(XLora(str(write_bundle(tmp_path / "bundle")), progress=False, **settings))
        return opened[-1]

    yield open_model
    for model in opened:
        model.close()


@pytest.fixture
def fake(open_fake: Callable[..., XLora]) -> XLora:
    return open_fake()
