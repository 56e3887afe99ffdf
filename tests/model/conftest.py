"""Tiny models, built once per session."""

from __future__ import annotations

import pytest

from tests.support.tiny import Tiny
from tests.support.torch_fixtures import native_kernels, one_thread, seeded  # noqa: F401


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Llama with three experts of different ranks, targets and scales: rsLoRA, rank_pattern, alpha_pattern."""
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    return Tiny(tmp_path_factory.mktemp("tiny") / "mixed", xlora=xlora, strength=0.3, head=1.5)
