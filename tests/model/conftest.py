"""Tiny models, built once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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
    """Llama with three experts of different ranks, targets and scales: rsLoRA, rank_pattern, alpha_pattern."""
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    return Tiny(tmp_path_factory.mktemp("tiny") / "mixed", xlora=xlora, strength=0.3, head=1.5)
