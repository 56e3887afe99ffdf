"""Attention on a GPU where Triton cannot be used: found at start, said once, and the tokens are right."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import ROOT
from service.model.attention import backends, paged
from service.model.attention.reference import sdpa
from tests.gpu.conftest import Build
from tests.support.driver import Run, greedy, run
from tests.support.gpu_requests import assert_same, plain, prompt

_SERVE = f"""
import torch
from benchmarks.common import DEMO, make_engine, run_engine
engine = make_engine(DEMO, device="cuda", max_model_len=256, kv_memory_bytes=32 << 20)
print(run_engine(engine, [{prompt(20)}], 12).tokens["0"])
"""


@pytest.fixture(scope="module")
def expected(build: Build) -> Run:
    return run(build("cpu"), plain())


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    for cached in (backends.cuda_backend, backends._tell):
        cached.cache_clear()
    yield
    for cached in (backends.cuda_backend, backends._tell):
        cached.cache_clear()


def test_the_backend_is_found_at_start(build: Build, cuda: torch.device) -> None:
    """Without graphs too, whose capture would ask."""
    build(cuda, cuda_graphs=False)
    assert backends.cuda_backend.cache_info().currsize > 0


def test_triton_is_in_use(build: Build, cuda: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """On a machine where it can be: fp32 is nothing for torch's own kernel."""
    pytest.importorskip("triton")
    with caplog.at_level(logging.WARNING):
        build(cuda)
    assert not caplog.records, caplog.text


def test_a_kernel_that_fails(
    build: Build, cuda: torch.device, expected: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Captured all the same, over the reference."""

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(backends, "triton_attend", fails)
    with caplog.at_level(logging.WARNING):
        engine = build(cuda)
    [record] = caplog.records
    assert "Failed to find C compiler" in record.getMessage()
    assert_same(run(engine, plain()), expected)


@pytest.mark.parametrize("graphs", [True, False])
def test_the_reference(
    build: Build, gpu: torch.device, expected: Run, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """torch's operators over copied keys, captured in graphs as well."""
    monkeypatch.setattr(paged, "cuda_backend", lambda _: sdpa)
    assert_same(run(build(gpu, cuda_graphs=graphs), plain()), expected)


def test_a_machine_without_a_compiler(build: Build, cuda: torch.device, tmp_path: Path) -> None:
    """A process that finds neither a compiler nor what one has built before."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _SERVE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens = run(build("cpu"), [greedy("r", prompt(20), 12)])["r"].tokens
    assert done.stdout.splitlines()[-1] == str(tokens)
    assert done.stderr.count("Triton cannot be used") == 1, done.stderr
