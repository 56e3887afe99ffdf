"""Whole engine steps on a fake CUDA device with the Triton backend, whose kernels are launched on nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: `make check-gpu` has it")

from service.model.attention import triton as paged_triton
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_cuda_device import DeviceFault
from tests.support.fake_cuda_engine import KINDS, FakeCudaEngines, attention
from tests.support.fake_cuda_operators import same_device
from tests.support.tiny import Tiny
from tests.support.triton_kernels import replaced_launches


@pytest.fixture(scope="module")
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture(scope="module")
def engines(cuda: FakeCuda, tmp_path_factory: pytest.TempPathFactory) -> FakeCudaEngines:
    made = FakeCudaEngines(Tiny(tmp_path_factory.mktemp("tiny") / "plain"), cuda)
    with cuda:
        made.move()
    return made


@pytest.fixture
def launched(cuda: FakeCuda) -> Iterator[list[str]]:
    """The kernels that were launched."""
    found: list[str] = []

    def launch(kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        assert all(isinstance(one, int) and one > 0 for one in grid), grid
        assert same_device(args) == "cuda", "a kernel reads tensors of the host"
        found.append(kernel.fn.__name__)
        cuda.launch(found[-1])

    with cuda, attention(paged_triton.attend), replaced_launches(launch):
        yield found


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["chunked prefill", "drafts", "everything"])
def test_steps(engines: FakeCudaEngines, launched: list[str], name: str, captured: bool) -> None:
    """No wait inside the backend: one a step, and the last may have one more (test_steps.py)."""
    steps = engines.steps(KINDS[name], cuda_graphs=captured)
    assert "_attend_kernel" in launched
    assert all(step.waits.total() == 1 for step in steps[:-1])


def test_finds_a_host_tensor(engines: FakeCudaEngines, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    attend = paged_triton.attend

    def misplaced(rows: Any, group: Any, *args: Any) -> Any:
        group.block_table = torch.zeros(group.block_table.shape, dtype=torch.int64)
        return attend(rows, group, *args)

    with attention(misplaced), pytest.raises((AssertionError, DeviceFault)):
        engines.steps(KINDS["greedy"])
    assert launched == []
