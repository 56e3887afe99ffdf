"""Tiny models and engines for the native step, whose library is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.native import library
from tests.engine.conftest import tiny  # noqa: F401
from tests.support.torch_fixtures import native_kernels, one_thread, seeded  # noqa: F401


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads compute."""
    library.use_threads(request.param)
    yield request.param
    library.use_threads(1)
