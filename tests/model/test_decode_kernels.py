"""The C++ kernels of decode steps against torch and the reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.engine.options import EngineOptions
from service.model import decode_kernels, kernel_library
from service.model.attention import sdpa
from service.model.batch import LINES, AttentionGroup, Batch
from service.model.build_folder import scratch_in
from service.model.gate import Gate
from service.model.kv_cache import KVCache, KVLayout
from tests.model.test_classifier import E, H, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    kernel_library.provide(Path(EngineOptions("").native_cache).expanduser())
    kernel_library.use_threads(request.param)
    yield request.param
    kernel_library.use_threads(1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 32])
def test_linear(threads: int, rows: int, dtype: torch.dtype) -> None:
    """Every number of rows left over, widths and depths that no vector divides, experts on all, some and no rows."""
    for width, depth, rank in product((1, 12, 50, 193), (3, 8, 40), (0, 1, 7, 60)):
        x, weight = torch.randn(rows, depth, dtype=dtype), torch.randn(width, depth, dtype=dtype)
        for bias, first in product((None, torch.randn(width, dtype=dtype)), {0, rows // 2, rows}):
            expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            a, b_t = torch.randn(rank, depth, dtype=dtype), torch.randn(rank, width, dtype=dtype)
            gate = torch.randn(rows - first, 3 * rank, dtype=dtype)[:, rank : 2 * rank]  # as Gate.at cuts it
            stack = (a, b_t, gate) if rank else (None, None, None)
            if rank:
                expected[first:] += (F.linear(x[first:].double(), a.double()) * gate.double()) @ b_t.double()
            ours = decode_kernels.adapted_linear(x[None], weight, bias, *stack, first)[0]
            assert ours.dtype == dtype
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(ours.double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 16, 35])
def test_large_weights(threads: int, rows: int, dtype: torch.dtype) -> None:
    """Such as come from memory, and rows too long for the nearest cache."""
    width, depth, rank = 590, 2030, 5  # what is left of 2030 is some vectors and some numbers
    x, weight = torch.randn(rows, depth, dtype=dtype), torch.randn(width, depth, dtype=dtype)
    a, b_t = torch.randn(rank, depth, dtype=dtype), torch.randn(rank, width, dtype=dtype)
    gate = torch.randn(rows, rank, dtype=dtype)
    expected = F.linear(x.double(), weight.double()) + (F.linear(x.double(), a.double()) * gate.double()) @ b_t.double()
    ours = decode_kernels.adapted_linear(x, weight, None, a, b_t, gate, 0)
    scale = float(expected.abs().max())
    torch.testing.assert_close(ours.double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention(threads: int, window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    """Contexts of one token up to several times what is looked at together, grouped heads, odd sizes of head and block.

    What no row may see is NaN in ours.
    """
    sizes = [
        (4, 1, 1, 8),
        (16, 2, 3, 32),
        (7, 2, 4, 20),
        (16, 1, 8, 64),
        (4, 1, 5, 44),
        (16, 8, 2, 96),
    ]  # the last is fetched ahead
    for block_size, kv_heads, heads_each, head_dim in sizes:
        positions = torch.tensor([0, block_size, 41, 255, 256, 700])
        width = 700 // block_size + 1
        cache = KVCache.allocate(
            KVLayout(1, kv_heads, head_dim, block_size, 1, 1, dtype), len(positions) * width, torch.zeros(1, 1)
        )
        cache.keys[0].normal_()
        cache.values[0].normal_()
        table = torch.randperm(len(positions) * width).view(len(positions), width)
        query = torch.randn(len(positions), heads_each * kv_heads, head_dim, dtype=dtype)
        group = AttentionGroup(0, len(positions), 1, positions[:, None], table, 701, needs_mask=True)
        wide = KVCache([cache.keys[0].double()], [cache.values[0].double()], cache.gate_rows)
        expected = sdpa(query.double(), group, 0, wide, 0.3, window, softcap)
        for row, position in enumerate(positions.tolist()):
            for number in range(position + 1, width * block_size):
                block, offset = table[row, number // block_size], number % block_size
                cache.keys[0][block, offset] = cache.values[0][block, offset] = float("nan")
        ours = self_attention(query, cache, table, positions, (0.3, window, softcap))
        torch.testing.assert_close(ours.double(), expected, atol=TOLERANCE[dtype], rtol=0)


def self_attention(query: Tensor, cache: KVCache, table: Tensor, positions: Tensor, how: tuple[Any, ...]) -> Tensor:
    """Of a step, which finds the cache without the rows' own keys and values, and brings those."""
    block_size = cache.block_size
    slots = table.gather(1, (positions // block_size)[:, None])[:, 0] * block_size + positions % block_size
    pool = [one[0].flatten(0, 1) for one in (cache.keys, cache.values)]
    key, value = (one[slots].transpose(0, 1)[None] for one in pool)
    expected = [one.clone() for one in pool]
    for one in pool:
        one[slots] = float("nan")
    rows = torch.zeros(LINES, len(positions), dtype=torch.int64)
    rows[1], rows[2] = positions, slots
    batch = Batch(rows, 0, slots, [AttentionGroup(0, len(positions), 1, positions[:, None], table, 701, True)])
    wide = torch.randn(1, 2, *query.shape, dtype=query.dtype)  # rows and heads do not lie side by side
    wide[:, 1] = query
    attended = decode_kernels.self_attention(wide[:, 1].transpose(1, 2), key, value, batch, 0, cache, *how)
    for found, wanted in zip(pool, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)
    return attended[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_siblings(threads: int, rows: int, dtype: torch.dtype) -> None:
    """Parts of all widths and ranks, one of them without experts: what each gives alone."""
    widths, ranks, depth = (50, 7, 193), (5, 0, 60), 40
    x, weight = torch.randn(1, rows, depth, dtype=dtype), torch.randn(sum(widths), depth, dtype=dtype)
    a, bias = torch.randn(sum(ranks), depth, dtype=dtype), torch.randn(sum(widths), dtype=dtype)
    b_t = [torch.randn(rank, width, dtype=dtype) for rank, width in zip(ranks, widths, strict=True)]
    for first in {0, rows // 2}:
        gate = torch.randn(rows - first, sum(ranks), dtype=dtype)
        ours = decode_kernels.siblings(x, weight, bias, a, b_t, gate, first)
        alone = [
            decode_kernels.adapted_linear(x, *one, first)
            for one in zip(
                *(weight.split(widths), bias.split(widths), a.split(ranks), b_t, gate.split(ranks, 1)), strict=True
            )
        ]
        scale = float(ours.abs().max())
        torch.testing.assert_close(ours / scale, torch.cat(alone, -1) / scale, atol=TOLERANCE[dtype] / 8, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("depth", [3, 8, 37, 192])
def test_norm(native_kernels: None, depth: int, dtype: torch.dtype) -> None:
    x, weight = 10 * torch.randn(1, 5, depth, dtype=dtype), torch.randn(depth, dtype=dtype)
    x[0, 3] = 0
    expected = F.rms_norm(x.double(), (depth,), weight.double(), 1e-5)
    ours = decode_kernels.norm(x.transpose(0, 1).contiguous().transpose(0, 1), weight, 1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("first_row", [0, 2, 5])
def test_spread(native_kernels: None, first_row: int, layerwise: bool) -> None:
    """What Gate makes of stored rows with torch's operators."""
    ranks = [[3, 0, 17], [1, 2, 0], [0, 0, 0], [30, 1, 1]]
    gate = Gate(ranks, layerwise=layerwise, dtype=torch.float32, device=torch.device("cpu"))
    gate.global_scaling_weight = 0.7
    stored, slots = torch.randn(9, 4 if layerwise else 1, 3), torch.tensor([4, 4, 0, 8, 2, 7])
    gate.read(stored, slots, first_row)
    expected = gate.spread
    gate.clear()
    gate.choose(decode_kernels.DECODE_FEW_ROWS, 1)
    gate.read(stored, slots, first_row)
    assert gate.active
    assert gate.first_row == first_row
    assert expected is not None
    assert gate.spread is not None
    torch.testing.assert_close(gate.spread, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(gate.at(3), gate.spread[:, -32:], atol=0, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("depth", "xlora"),
    [
        (1, {}),
        (2, {"softmax_temperature": 0.3}),
        (3, {"enable_softmax": False}),
        (4, {"enable_relu_and_dropout": False, "layerwise_scalings": False}),
    ],
    ids=str,
)
def test_scalings(native_kernels: None, depth: int, xlora: dict[str, Any], bias: bool, rows: int) -> None:
    """What Classifier computes, and its scalings where they are stored; no other slot changes."""
    classifier, _ = build(xlora_depth=depth, use_bias=bias, **{"enable_relu_and_dropout": True, **xlora})
    hidden = 30 * torch.randn(7, H)  # some logits far apart
    stored, slots = torch.full((9, classifier.stored_sites, E), float("nan")), torch.tensor([8, 0, 5, 3, 1, 2, 4])
    logits = decode_kernels.scalings(
        *(hidden, classifier.tensors, classifier.config.enable_relu_and_dropout, classifier.softmax_temperature),
        *(stored, slots, rows),
    )
    expected = classifier.logits(hidden[:rows])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(stored[slots[:rows]], classifier.scalings(expected), atol=1e-5, rtol=1e-5)
    assert stored[slots[rows:]].isnan().all()


def test_what_does_not_fit_is_an_error(threads: int) -> None:
    """Of another dtype, or another width: the caller is told, and memory is not read as what it is not."""
    x, weight = torch.randn(1, 2, 8), torch.randn(8, 8)
    for wrong in (weight.half(), weight.double(), weight.T, torch.randn(8, 9)):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            decode_kernels.linear(x, wrong)
    for wrong in (torch.randn(8).bfloat16(), torch.randn(9)):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            decode_kernels.norm(x, wrong, 1e-5)
    with pytest.raises(RuntimeError, match="fitting shapes"):
        decode_kernels.linear(x.half(), weight.half())
    for wrong in (torch.randn(1, 2, 6), torch.randn(1, 1, 8), torch.randn(1, 2, 8).double()):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            decode_kernels.rotate(x[:, None], wrong, wrong)
    query, own, pool = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8), torch.zeros(2, 4, 2, 8)
    table, positions = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for one, keys, values, blocks, places in (
        (torch.randn(1, 5, 1, 8), pool, pool, table, positions),
        (torch.randn(1, 4, 1, 6), pool, pool, table, positions),
        (query, pool, pool[:, :2], table, positions),
        (query, pool, pool, table.repeat(2, 1), positions),
        (query, pool, pool, table, positions.repeat(2)),
        (query, pool, pool, table, positions.int()),
    ):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            torch.ops.xlora.decode_self_attention(one, own, own, keys, values, positions, blocks, places, 0.3, 0, 0.0)
    a, gate = torch.randn(3, 8), torch.randn(2, 3)
    for first_row, rows in ((0, 1), (0, 3), (-1, 3), (3, 0)):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            decode_kernels.adapted_linear(x, weight, None, a, torch.randn(3, 8), torch.randn(rows, 3), first_row)
    stored, slots = torch.zeros(4, 2, 3), torch.tensor([1, 2])
    for wrong in ((stored.double(), slots), (stored, slots.int()), (stored[:, :, :2], slots), (stored[0], slots)):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            decode_kernels.spread(*wrong, torch.tensor([0, 5]), 0, 1.0)
    for first_row in (-1, 3):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            decode_kernels.spread(stored, slots, torch.tensor([0, 5]), first_row, 1.0)
    last, none = torch.randn(6, 8), torch.empty(0)
    for layers, hidden, rows in (
        ([last, torch.randn(5)], x[0], 1),
        ([last, torch.randn(12)[::2]], x[0], 1),
        ([last[:5], none], x[0], 1),
        ([last, none], x[0, :, :7].contiguous(), 1),
        ([last, none], x[0], 3),
        ([last.double(), none], x[0], 1),
        ([], x[0], 1),
    ):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            decode_kernels.scalings(hidden, layers, True, 1.0, stored, slots, rows)
    assert not stored.any()
    for b_t in ([torch.randn(3, 7)], [torch.randn(2, 8)], [torch.randn(3, 8).bfloat16()], []):
        with pytest.raises(RuntimeError, match="fitting shapes"):
            decode_kernels.siblings(x, weight, None, a, b_t, gate, 0)


def test_processes_that_start_together_compile_it_once(tmp_path: Path) -> None:
    """160 compilers at once have used up a machine's memory."""
    script = (
        "import sys, pathlib; from service.model import kernel_library as kernels; build = kernels.build\n"
        "kernels.build = lambda library: (print('compiled'), build(library))\n"
        "kernels.provide(pathlib.Path(sys.argv[1]))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sorted(told) == ["", "", "compiled\n"]


def test_what_a_killed_build_has_left_is_removed(tmp_path: Path) -> None:
    """... once it is old; what is under way is not."""
    abandoned, running = tmp_path / "compiling-old", tmp_path / "compiling-new"
    abandoned.mkdir()
    running.mkdir()
    os.utime(abandoned, (1, 1))
    with scratch_in(tmp_path) as scratch:
        assert scratch.parent == tmp_path
    assert list(tmp_path.iterdir()) == [running]


def test_what_the_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "operators.cpp").write_text("this is no C++")
    monkeypatch.setattr(kernel_library, "_SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match="could not be compiled"):
        kernel_library.provide(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()), "nothing is left"
