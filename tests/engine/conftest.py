"""Tiny engines, built once per session."""

from __future__ import annotations

import pytest

from tests.support.driver import Engines
from tests.support.tiny import Tiny
from tests.support.torch_fixtures import native_kernels, one_thread, seeded  # noqa: F401


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Llama with three experts of different ranks, targets and scales, a classifier of depth 2, drafts of depth 4."""
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    return Tiny(tmp_path_factory.mktemp("tiny") / "mixed", xlora=xlora, strength=0.3, draft_head=8, draft_depth=4)


@pytest.fixture(scope="session")
def engines(tiny: Tiny) -> Engines:
    """Engines of the bundle as it is stored: the draft is right about half the time."""
    return Engines(tiny.as_stored())


@pytest.fixture(params=[True, False], ids=["lookahead", "plain"])
def lookahead(request: pytest.FixtureRequest) -> bool:
    """With and without the lookahead scaling pass."""
    return bool(request.param)
