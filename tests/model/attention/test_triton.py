"""The Triton kernel against the SDPA reference: on the GPU where there is one, else in Triton's interpreter.

torch's CPU builds come without triton; without it these tests are skipped. `make check-gpu` runs them on a CPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from service.model.attention import triton as paged_triton
from service.model.attention.reference import sdpa
from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache, KVLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton without a GPU needs TRITON_INTERPRET=1", allow_module_level=True)

# numpy's warnings about Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Of the result, relative to values of order 1: the reference rounds its weights to 16 bits as well.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def case(
    lengths: list[int],
    queries: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, AttentionGroup, KVCache]:
    """Streams of `lengths` keys in scattered blocks; the last `queries` of each are rows."""
    generator = torch.Generator().manual_seed(sum(lengths) + queries)
    widths = [-(-length // block) for length in lengths]
    layout = KVLayout(2, kv_heads, head_dim, block, 1, 1, dtype)
    cache = KVCache.allocate(layout, sum(widths) + 1, torch.zeros(1, 1, device=DEVICE))
    order = torch.randperm(cache.num_blocks, generator=generator).tolist()
    tables = []
    for length, width in zip(lengths, widths, strict=True):
        table = [order.pop() for _ in range(width)]
        slots = torch.tensor([table[p // block] * block + p % block for p in range(length)], device=DEVICE)
        key, value = (torch.randn(length, kv_heads, head_dim, generator=generator).to(DEVICE, dtype) for _ in "kv")
        cache.write(1, slots, key, value)
        tables.append(table + [table[0]] * (max(widths) - width))
    positions = torch.tensor([range(length - queries, length) for length in lengths], device=DEVICE)
    group = AttentionGroup(
        0, len(lengths), queries, positions, torch.tensor(tables, device=DEVICE), max(lengths), needs_mask=True
    )
    # A strided view, as the decoders hand their queries over.
    rows = torch.randn(heads, len(lengths) * queries, head_dim, generator=generator).to(DEVICE, dtype).transpose(0, 1)
    return rows, group, cache


def assert_matches_reference(
    rows: Tensor, group: AttentionGroup, cache: KVCache, window: int | None = None, softcap: float | None = None
) -> None:
    arguments = (rows, group, 1, cache, 0.3, window, softcap)
    tolerance = TOLERANCE[rows.dtype]
    ours = paged_triton.attend(*arguments)
    assert ours.shape == rows.shape
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, sdpa(*arguments), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(
    ("lengths", "queries"), [([9], 1), ([5, 40, 1, 33], 1), ([7], 4), ([70], 70), ([21, 50], 5), ([100], 37)]
)
def test_grouped_heads(heads: tuple[int, int], lengths: list[int], queries: int) -> None:
    """Query heads on the wrong KV head, tiles that cross a query, padding of the last tile."""
    assert_matches_reference(*case(lengths, queries, heads=heads[0], kv_heads=heads[1]))


@pytest.mark.parametrize("window", [1, 3, 16, 33, 1000])
@pytest.mark.parametrize(("lengths", "queries"), [([5, 40, 100], 1), ([90], 37)])
def test_sliding_window(window: int, lengths: list[int], queries: int) -> None:
    """A window off by one, tiles before it that are skipped, rows that see nothing of a tile."""
    assert_matches_reference(*case(lengths, queries), window=window)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("window", [None, 7])
def test_soft_cap(softcap: float, window: int | None) -> None:
    """Gemma 2 has both."""
    assert_matches_reference(*case([5, 40], 1), window=window, softcap=softcap)
    assert_matches_reference(*case([40], 9), window=window, softcap=softcap)


@pytest.mark.parametrize("block", [1, 4, 16, 24, 256])
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_block_and_head_sizes(block: int, head_dim: int) -> None:
    """Any block size, head sizes that are no power of two."""
    assert_matches_reference(*case([5, 40], 1, block=block, head_dim=head_dim))
    assert_matches_reference(*case([40], 9, block=block, head_dim=head_dim))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                DEVICE.type == "cpu", reason="Triton's interpreter multiplies bfloat16 as integers"
            ),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dtypes(dtype: torch.dtype, head_dim: int) -> None:
    """fp32 keeps its precision; every tiling is used."""
    assert_matches_reference(*case([5, 150], 1, dtype=dtype, head_dim=head_dim))
    assert_matches_reference(*case([130], 20, dtype=dtype, head_dim=head_dim))


@pytest.mark.parametrize("window", [None, 50, 200])
@pytest.mark.parametrize("lengths", [[700], [130, 700], [1, 700], [640, 641, 2]])
def test_split_keys(lengths: list[int], window: int | None) -> None:
    """Parts joined with the wrong weights; parts without a single key, of a short row or outside a window."""
    rows, group, cache = case(lengths, 1)
    assert paged_triton._splits(len(lengths) * 2, group.keys, 16) > 1
    assert_matches_reference(rows, group, cache, window=window)


def test_unseen_slots_are_not_read() -> None:
    """NaN in every slot but the streams' own: those of other requests, of padding, behind the last position."""
    rows, group, cache = case([5, 40, 33], 1)
    expected = sdpa(rows, group, 1, cache, 0.3, None, None)
    own = torch.zeros(cache.keys[1].shape[:2], dtype=torch.bool, device=DEVICE).flatten()
    for length, table in zip([5, 40, 33], group.block_table.tolist(), strict=True):
        own[[table[p // 16] * 16 + p % 16 for p in range(length)]] = True
    for pool in (cache.keys[1], cache.values[1]):
        pool.flatten(0, 1)[~own] = float("nan")
    torch.testing.assert_close(paged_triton.attend(rows, group, 1, cache, 0.3, None, None), expected)


def test_wider_tables_change_nothing() -> None:
    """A captured step has a table of fixed width, and more keys than any row needs."""
    rows, group, cache = case([5, 40], 1)
    expected = paged_triton.attend(rows, group, 1, cache, 0.3, None, None)
    group.block_table = torch.cat([group.block_table, group.block_table.new_full((2, 60), 10**9)], 1)
    group.keys = group.block_table.shape[1] * 16
    torch.testing.assert_close(paged_triton.attend(rows, group, 1, cache, 0.3, None, None), expected)


@pytest.mark.parametrize(
    ("programs", "keys", "expected"), [(16, 4096, 16), (1, 4096, 32), (512, 4096, 1), (16, 100, 1), (16, 300, 2)]
)
def test_number_of_splits(programs: int, keys: int, expected: int) -> None:
    """Enough programs for 132 processors, parts of at least 128 keys."""
    assert paged_triton._splits(programs, keys, 132) == expected
