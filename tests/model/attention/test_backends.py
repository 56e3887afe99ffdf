"""Which backend attends on a GPU, with stand-ins for Triton's kernel on a CPU: one that works, each way to fail."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from service.model.attention import backends, varlen
from service.model.attention.backends import Shape, cuda_backend
from service.model.attention.reference import sdpa
from service.model.steps.warm_up import warm_up
from tests.support.driver import Engines, greedy, run, words
from tests.support.tiny import Tiny

SHAPE = Shape(torch.device("cpu"), torch.float32, 4, 2, 16, 16, None, None)
SHAPES = [SHAPE, SHAPE._replace(window=40), SHAPE._replace(softcap=30.0), SHAPE._replace(kv_heads=4, block_size=64)]


def works(*arguments: Any) -> Tensor:
    return sdpa(*arguments)


def no_compiler(*_: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def compiler_fails(*_: Any) -> Tensor:
    raise subprocess.CalledProcessError(1, ["cc", "main.c"])


def no_driver(*_: Any) -> Tensor:
    raise AssertionError("libcuda.so cannot found!\nPossible files are located at []")


class DoesNotCompile(Exception):
    """Triton's own errors derive from nothing narrower."""


def prefill_does_not_compile(rows: Tensor, *rest: Any) -> Tensor:
    if len(rows) > 1:
        raise DoesNotCompile("out of resource: shared memory, Required: 180224, Hardware limit: 101376")
    return sdpa(rows, *rest)


def wrong_over_many_keys(rows: Tensor, group: Any, *rest: Any) -> Tensor:
    return sdpa(rows, group, *rest) + (group.keys > 128)


FAILURES: dict[str, Callable[..., Tensor]] = {
    "Failed to find C compiler": no_compiler,
    "returned non-zero exit status": compiler_fails,
    "libcuda.so cannot found": no_driver,
    "shared memory": prefill_does_not_compile,
    "wrong for 1 queries over 512 keys": wrong_over_many_keys,
}


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    for cached in (cuda_backend, backends._warn):
        cached.cache_clear()
    yield
    for cached in (cuda_backend, backends._warn):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_works_is_taken(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And its trial does not take NaN in unused slots, windows or soft caps for errors."""
    monkeypatch.setattr(backends, "triton_attend", works)
    assert cuda_backend(shape._replace(dtype=dtype)) is works
    assert not caplog.records


@pytest.mark.parametrize("reason", FAILURES)
def test_what_fails_is_replaced_with_one_line(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "triton_attend", FAILURES[reason])
    with caplog.at_level(logging.WARNING):
        assert {cuda_backend(shape) for shape in SHAPES} == {sdpa}
    [record] = caplog.records
    assert reason in record.getMessage()
    assert "\n" not in record.getMessage()


def test_no_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A block size that torch's own kernel would take is named, where there is one."""
    monkeypatch.setattr(backends, "triton_attend", None)
    monkeypatch.setattr(varlen, "works", lambda *shape: shape[5] == 256)
    with caplog.at_level(logging.WARNING):
        assert cuda_backend(SHAPE) is sdpa
        assert cuda_backend(SHAPE._replace(window=40)) is sdpa
        assert cuda_backend(SHAPE._replace(block_size=256)) is varlen.attend
    [record] = caplog.records
    assert "Triton is not installed" in record.getMessage()
    assert "--block-size 256" in record.getMessage()


def test_heads_too_large_for_the_kernel_are_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "triton_attend", no_compiler)
    assert cuda_backend(SHAPE._replace(head_dim=512)) is sdpa
    assert not caplog.records


def test_the_first_step_leaves_no_trace(tmp_path: Any) -> None:
    """It runs before any request, on an engine that then does as one that had none."""
    engines = Engines(Tiny(tmp_path / "bundle").variant())
    warm, cold = (engines.build(native_kernels=False) for _ in range(2))
    cache = warm.runner.kv_cache
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values, cache.gate_rows)]
    asked: list[int] = []
    step = warm.runner.step

    class Recorded:
        def forward(self, batch: Any, kv_cache: Any) -> Any:
            asked.append(batch.fields.shape[1])
            return step.forward(batch, kv_cache)

    warm_up(Recorded(), cache, drafts=False)
    assert asked == [2]
    *pools, gate_rows = before
    for old, new in zip(pools, (*cache.keys, *cache.values), strict=True):
        assert torch.equal(old[:-1], new[:-1]), "only the scratch block is written"
    kept = torch.arange(len(gate_rows)) != cache.scratch_slot
    assert torch.equal(gate_rows[kept], cache.gate_rows[kept])
    requests = [greedy("r", words(1, 20), 12)]
    assert run(warm, requests)["r"].tokens == run(cold, requests)["r"].tokens
