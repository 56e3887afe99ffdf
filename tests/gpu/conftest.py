"""The engine on a GPU. Skipped without one; with one, in an environment of torch, transformers and pytest alone:

    python -m pytest tests/gpu tests/model/attention/test_triton.py

GPU_REHEARSAL=1 runs the same tests with the CPU in place of the GPU, those that need CUDA itself left out: what they
force (preemptions, hits, aborts) must happen there too.
"""

from __future__ import annotations

import copy
import os
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
from tests.support.torch_fixtures import one_thread, seeded  # noqa: F401

Build = Callable[..., Engine]


@pytest.fixture(autouse=True, scope="session")
def gpu() -> torch.device:
    """The device under test."""
    if os.environ.get("GPU_REHEARSAL") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda:0")


@pytest.fixture(scope="session")
def cuda(gpu: torch.device) -> torch.device:
    """The same for tests that need CUDA itself."""
    if gpu.type != "cuda":
        pytest.skip("a rehearsal without a GPU")
    return gpu


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """The demo bundle."""
    return load_checkpoint(DEMO)


@pytest.fixture(scope="session")
def build(checkpoint: Checkpoint) -> Build:
    """build(device, dtype, blocks=, **options): an engine of the demo. Models are loaded once; native kernels are left
    out, so that the side on the CPU is torch's operators.
    """

    @cache
    def base(dtype: torch.dtype) -> Any:
        return run(Loading(checkpoint, torch.device("cpu"), dtype), BASE_PASSES).causal_lm

    @cache
    def model(device: torch.device, dtype: torch.dtype) -> XLoraModel:
        return XLoraModel(checkpoint, copy.deepcopy(base(dtype)).to(device), device=device, dtype=dtype)

    def engine(
        device: str | torch.device, dtype: torch.dtype = torch.float32, *, blocks: int | None = None, **options: Any
    ) -> Engine:
        chosen = model(torch.device(device), dtype)
        settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 16, "native_kernels": False, **options}
        size = 64 << 20
        if blocks is not None:
            size = blocks * chosen.kv_layout(settings.get("block_size", EngineOptions("").block_size)).block_bytes
        settings["kv_memory_bytes"] = size
        return build_engine(chosen, checkpoint, EngineOptions(model=str(DEMO), device=str(device), **settings))

    return engine
