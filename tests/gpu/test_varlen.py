"""torch's varlen_attn over block tables against the reference, where the installed torch has it."""

from __future__ import annotations

import pytest
import torch

from service.model.attention import varlen
from service.model.attention.reference import sdpa
from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache, KVLayout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("lengths", "queries"), [([5, 300, 700], 1), ([300], 300), ([600, 520], 16)])
def test_equals_the_reference(
    cuda: torch.device, dtype: torch.dtype, block: int, window: int | None, lengths: list[int], queries: int
) -> None:
    """Offsets, lengths, the window's size, causal rows at the end of longer streams; NaN in every unused slot."""
    heads, kv_heads, head_dim = 8, 2, 64
    if not varlen.works(cuda, dtype, heads, kv_heads, head_dim, block):
        pytest.skip(f"torch {torch.__version__}: varlen_attn does not take blocks of {block}")
    widths = [-(-length // block) for length in lengths]
    layout = KVLayout(1, kv_heads, head_dim, block, 1, 1, dtype)
    cache = KVCache.allocate(layout, sum(widths), torch.zeros(1, 1, device=cuda))
    order = torch.randperm(cache.num_blocks).tolist()
    tables = [[order.pop() for _ in range(width)] for width in widths]
    used = [table[p // block] * block + p % block for table, n in zip(tables, lengths, strict=True) for p in range(n)]
    for pool in (*cache.keys, *cache.values):
        slots = pool.fill_(torch.nan).flatten(0, 1)
        slots[used] = torch.randn_like(slots[used])
    padded = [table + table[:1] * (max(widths) - len(table)) for table in tables]
    positions = torch.tensor([range(length - queries, length) for length in lengths], device=cuda)
    group = AttentionGroup(
        0, len(lengths), queries, positions, torch.tensor(padded, device=cuda), max(lengths), needs_mask=True
    )
    rows = torch.randn(len(lengths) * queries, heads, head_dim, device=cuda, dtype=dtype)
    arguments = (rows, group, 0, cache, 0.2, window, None)
    torch.testing.assert_close(varlen.attend(*arguments), sdpa(*arguments), atol=3e-2, rtol=3e-2)
