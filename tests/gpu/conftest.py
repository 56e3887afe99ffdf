"""Skipped without a GPU. With one: `python -m pytest -n 0 tests/gpu tests/model/attention/test_triton.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.common import DEMO
from service.checkpoint import Checkpoint, load_checkpoint
from service.contract.options import EngineOptions
from service.engine.engine import Engine
from service.engine.loader import build_engine
from service.model.loading.passes import BASE_PASSES, Loading, run
from service.model.xlora_model import XLoraModel
from tests.support.torch_fixtures import seeded  # noqa: F401

Build = Callable[..., Engine]


@pytest.fixture(autouse=True, scope="session")
def cuda() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda:0")


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """The demo bundle."""
    return load_checkpoint(DEMO)


@pytest.fixture(scope="session")
def build(checkpoint: Checkpoint) -> Build:
    """build(device, dtype, **options): an engine of the demo. Models are loaded once."""

    @cache
    def base(dtype: torch.dtype) -> Any:
        return run(Loading(checkpoint, torch.device("cpu"), dtype), BASE_PASSES).causal_lm

    @cache
    def model(device: torch.device, dtype: torch.dtype) -> XLoraModel:
        return XLoraModel(checkpoint, copy.deepcopy(base(dtype)).to(device), device=device, dtype=dtype)

    def engine(device: str | torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
        settings = {"max_model_len": 512, "max_num_seqs": 16, "kv_memory_bytes": 64 << 20, **options}
        chosen = model(torch.device(device), dtype)
        return build_engine(chosen, checkpoint, EngineOptions(model=str(DEMO), device=str(device), **settings))

    return engine
