"""csrc/helpers.h: what threads compute that are late, many or gone is what one computes, bit for bit."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.contract.options import EngineOptions
from service.native import library, operators

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")

CACHE = Path(EngineOptions("").native_cache).expanduser()
MANY = 4 * (os.cpu_count() or 1)  # there is always one that has to wait for a core


@pytest.fixture(autouse=True)
def alone_again() -> Iterator[None]:
    library.provide(CACHE)
    yield
    library.use_threads(1)


def repeated() -> int:
    """How many chunks have been computed twice so far."""
    loaded = ctypes.CDLL(str(library.library_in(CACHE)))  # the same once more
    loaded.xlora_repeated_chunks.restype = ctypes.c_int64
    return int(loaded.xlora_repeated_chunks())


def linear(stored: torch.dtype) -> Callable[[], Tensor]:
    """What computes an adapted linear, in 13 chunks of outputs and 6 of ranks."""
    rows, depth, width, rank = 160, 300, 600, 90
    x, gate = torch.randn(rows, depth), torch.randn(rows - 7, rank)
    weight, bias = torch.randn(width, depth).to(stored), torch.randn(width)
    a, b_t = torch.randn(rank, depth).to(stored), torch.randn(rank, width).to(stored)
    return lambda: operators.linear(x, weight, bias, a, b_t, gate, 7)


def layers(segments: int, rows_each: int) -> Callable[[], Tensor]:
    """What computes a layer whose time is attention: every segment's rows over up to 6,400 tokens."""
    heads, kv_heads, head_dim, block_size, blocks, hidden, inner = 6, 2, 32, 16, 400, 64, 32
    rows, across, kv_across = segments * rows_each, heads * head_dim, kv_heads * head_dim
    widths = [across, kv_across, kv_across, hidden, inner, inner, hidden]
    depths = [hidden, hidden, hidden, across, hidden, hidden, inner]
    none = torch.empty(0)
    tensors = [torch.rand(hidden), torch.rand(hidden), none, none]
    for width, depth in zip(widths, depths, strict=True):
        tensors += [torch.randn(width, depth) / depth**0.5, none, none, none]
    pool = [torch.randn(segments * blocks, block_size, kv_heads, head_dim) for _ in range(2)]
    table = torch.randperm(segments * blocks).view(segments, blocks)
    starts = torch.randint(0, blocks * block_size - rows_each, (segments,))
    positions = (starts[:, None] + torch.arange(rows_each)).flatten()
    owner = torch.arange(segments).repeat_interleave(rows_each)
    slots = table[owner, positions // block_size] * block_size + positions % block_size
    x, cos, sin = torch.randn(rows, hidden), torch.rand(rows, head_dim), torch.rand(rows, head_dim)
    return lambda: operators.layers(
        *(x, tensors, None, [0] * 7, 0, cos, sin, pool[:1], pool[1:], slots, positions, [table], [rows_each]),
        *(1e-5, 0.2, [0]),
    )


JOBS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "float32": lambda: linear(torch.float32),
    "bfloat16": lambda: linear(torch.bfloat16),
    "two single rows": lambda: layers(2, 1),
    "drafts and prompts": lambda: layers(3, 21),
}


@pytest.mark.parametrize(("threads", "idle_priority"), [(2, 0), (1, 1), (3, 2)])
@pytest.mark.parametrize("job", JOBS)
def test_the_same_as_one_thread(job: str, threads: int, idle_priority: int) -> None:
    compute = JOBS[job]()
    alone = compute()
    library.use_threads(threads, idle_priority)
    assert all(torch.equal(compute(), alone) for _ in range(100))
    library.use_threads(1)
    assert torch.equal(compute(), alone)


@pytest.mark.parametrize("job", JOBS)
def test_the_same_where_helpers_are_late(job: str) -> None:
    compute = JOBS[job]()
    alone, before = compute(), repeated()
    library.use_threads(2, MANY)
    for number in range(20_000):
        assert torch.equal(compute(), alone)
        if number >= 100 and repeated() > before + 3:
            return
    pytest.fail("nobody was late")


LATE = f"""
import pathlib, sys, torch
from service.native import library, operators
from tests.native.test_helpers import CACHE, repeated
library.provide(CACHE)
rows, depth, width, rank = map(int, sys.argv[2:])
path = pathlib.Path(sys.argv[1])
torch.randn(1 << 20).numpy().tofile(path)
mapped = lambda *shape: torch.from_file(str(path), size=shape[0] * shape[1]).view(shape)
gate = torch.randn(rows, rank)
def compute():
    experts = (mapped(rank, depth), mapped(rank, width), gate) if rank else (None, None, None)
    return operators.linear(mapped(rows, depth), mapped(width, depth), None, *experts, 0)
alone = compute()
library.use_threads(2, {MANY})
while repeated() < 50:
    assert torch.equal(compute(), alone)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 512, 1024, 0), (64, 1024, 4, 512), (64, 512, 300, 300)], ids=str)
def test_a_late_helper_reads_what_nobody_else_holds_any_more(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """What is mapped from a file goes with its tensor, right after the job; in another process, because reading it then
    would end it. Rows, depth, width, rank.
    """
    command = [sys.executable, "-c", LATE, str(tmp_path / "numbers"), *map(str, shape)]
    assert subprocess.run(command, timeout=300, check=False).returncode == 0


def test_switched_on_again() -> None:
    """Helpers, none, with idle priority instead, more of both."""
    compute = JOBS["float32"]()
    alone = compute()
    for _ in range(20):
        for threads, idle_priority in ((3, 0), (1, 0), (1, 2), (2, 3)):
            library.use_threads(threads, idle_priority)
            assert all(torch.equal(compute(), alone) for _ in range(5))


def test_two_threads_with_jobs_of_their_own() -> None:
    library.use_threads(3)
    wrong = []

    def check(compute: Callable[[], Tensor], expected: Tensor) -> None:
        wrong.extend([number for number in range(200) if not torch.equal(compute(), expected)])

    computes = [linear(torch.bfloat16), layers(9, 1)]
    threads = [threading.Thread(target=check, args=(compute, compute())) for compute in computes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_process_computes_the_same() -> None:
    library.use_threads(3)
    compute = linear(torch.float32)
    expected = compute()

    def check() -> None:
        assert torch.equal(compute(), expected)

    child = multiprocessing.get_context("fork").Process(target=check)
    child.start()
    child.join(60)
    assert child.exitcode == 0
