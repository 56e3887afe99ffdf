"""Tiny engines, built once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.engine.driver import Engines
from tests.model.tiny import Tiny


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads, and one thread is deterministic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Llama with three experts of different ranks, targets and scales, a layerwise classifier of depth 2."""
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    return Tiny(tmp_path_factory.mktemp("tiny") / "mixed", xlora=xlora, strength=0.3)


@pytest.fixture(scope="session")
def engines(tiny: Tiny) -> Engines:
    """Engines of the bundle as it is stored: the draft is right about half the time."""
    return Engines(tiny.as_stored())


@pytest.fixture(params=[True, False], ids=["lookahead", "plain"])
def lookahead(request: pytest.FixtureRequest) -> bool:
    """With and without the lookahead scaling pass."""
    return bool(request.param)
