"""Fixtures for tests that run torch; a conftest that wants them imports them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.contract.options import EngineOptions
from service.native import library


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads, and one thread is deterministic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def native_kernels() -> None:
    """Where there is a compiler, every engine has its kernels from the first step on."""
    if shutil.which("g++") is not None:
        cache = Path(EngineOptions("").native_cache).expanduser()
        library.provide(cache)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
