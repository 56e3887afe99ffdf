"""Paged attention against the eager formula over the same keys laid out densely."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.contract.errors import CheckpointError
from service.model.attention.paged import paged_attention
from service.model.batch import FIELDS, AttentionGroup, Batch
from service.model.kv_cache import KVCache, KVLayout

HEADS, HEAD_DIM, BLOCK = 4, 8, 4


def eager(
    query: Tensor, key: Tensor, value: Tensor, position: int, window: int | None, softcap: float | None, scale: float
) -> Tensor:
    """Attention of one query row [heads, d] at `position` over keys [L, kv_heads, d], one head and one key at a
    time.
    """
    out = torch.zeros_like(query)
    per_group = query.shape[0] // key.shape[1]
    first = 0 if window is None else max(0, position - window + 1)
    for head in range(query.shape[0]):
        keys, values = key[first : position + 1, head // per_group], value[first : position + 1, head // per_group]
        scores = keys @ query[head] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[head] = scores.softmax(0) @ values
    return out


def case(
    kv_heads: int, lengths: list[int], queries: int
) -> tuple[KVCache, Batch, Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Streams of `lengths` keys in scattered blocks of a pool of NaN;
    the last `queries` of each are this batch's rows.
    """
    generator = torch.Generator().manual_seed(len(lengths) * 100 + kv_heads * 10 + queries)
    widths = [-(-length // BLOCK) for length in lengths]
    cache = KVCache.allocate(
        KVLayout(2, kv_heads, HEAD_DIM, BLOCK, 1, 1, torch.float32), sum(widths) + 2, torch.zeros(1, 1)
    )
    for pool in (*cache.keys, *cache.values):
        pool.fill_(torch.nan)
    order = torch.randperm(cache.num_blocks, generator=generator).tolist()
    dense, slots, tables, positions = [], [], [], []
    new_keys, new_values = [], []
    for length, width in zip(lengths, widths, strict=True):
        table = [order.pop() for _ in range(width)]
        own = [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(length)]
        key, value = (torch.randn(length, kv_heads, HEAD_DIM, generator=generator) for _ in range(2))
        old = length - queries
        cache.write(1, torch.tensor(own[:old], dtype=torch.int64), key[:old], value[:old])
        dense.append((key, value))
        slots += own[old:]
        tables.append(table + [table[0]] * (max(widths) - width))
        positions.append(list(range(old, length)))
        new_keys.append(key[old:])
        new_values.append(value[old:])
    needs_mask = queries > 1 or min(lengths) != max(lengths)
    group = AttentionGroup(
        0, len(lengths), queries, torch.tensor(positions), torch.tensor(tables), max(lengths), needs_mask
    )
    batch = Batch(torch.tensor([slots] * FIELDS), 0, torch.empty(0, dtype=torch.int64), [group])
    query = torch.randn(1, HEADS, len(slots), HEAD_DIM, generator=generator) * 3
    key, value = (torch.cat(new).transpose(0, 1)[None] for new in (new_keys, new_values))
    return cache, batch, query, key, value, dense


LAYER: Any = SimpleNamespace(layer_idx=1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("lengths", "queries"), [([9], 1), ([5, 12, 1, 8], 1), ([7, 7], 1), ([9], 4), ([8], 8), ([13], 5)]
)
@pytest.mark.parametrize("window", [None, 3, 8, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_eager(
    kv_heads: int, lengths: list[int], queries: int, window: int | None, softcap: float | None
) -> None:
    """Query heads on the wrong KV head, a window or a mask off by one, keys of another stream or of padding, a
    lost soft cap.
    """
    cache, batch, query, key, value, dense = case(kv_heads, lengths, queries)
    out, _ = paged_attention(
        LAYER, query, key, value, None, kv_cache=cache, batch=batch, scaling=0.3, sliding_window=window, softcap=softcap
    )
    assert out.shape == (1, len(lengths) * queries, HEADS, HEAD_DIM)
    for number, (keys, values) in enumerate(dense):
        for q in range(queries):
            row = number * queries + q
            expected = eager(query[0, :, row], keys, values, len(keys) - queries + q, window, softcap, 0.3)
            torch.testing.assert_close(out[0, row], expected, atol=1e-5, rtol=0)


def test_groups_of_one_batch() -> None:
    """Two groups' rows are concatenated in order: the second group's start is where the first one's rows end."""
    cache, batch, query, key, value, dense = case(2, [5, 12], 1)
    [group] = batch.groups
    batch.groups = [
        AttentionGroup(i, 1, 1, group.positions[i : i + 1], group.block_table[i : i + 1], length, False)
        for i, length in enumerate([5, 12])
    ]
    out, _ = paged_attention(LAYER, query, key, value, None, kv_cache=cache, batch=batch, scaling=0.3)
    for row, (keys, values) in enumerate(dense):
        torch.testing.assert_close(
            out[0, row], eager(query[0, :, row], keys, values, len(keys) - 1, None, None, 0.3), atol=1e-5, rtol=0
        )


def test_only_its_own_layer_is_touched() -> None:
    """Every layer has its own pool."""
    cache, batch, query, key, value, _ = case(2, [6], 2)
    before = cache.keys[0].clone()
    paged_attention(LAYER, query, key, value, None, kv_cache=cache, batch=batch)
    torch.testing.assert_close(cache.keys[0], before, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("extra", [{"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"head_mask": 1}])
def test_unknown_attention_is_refused(extra: dict[str, Any]) -> None:
    """An argument that changes attention (sinks, ALiBi, ...) must not be dropped in silence."""
    cache, batch, query, key, value, _ = case(2, [6], 2)
    with pytest.raises(CheckpointError, match=next(iter(extra))):
        paged_attention(LAYER, query, key, value, None, kv_cache=cache, batch=batch, **extra)


def test_unknown_arguments_that_are_none_pass() -> None:
    """Many families hand on options they do not use."""
    cache, batch, query, key, value, _ = case(2, [6], 2)
    paged_attention(
        LAYER,
        query,
        key,
        value,
        None,
        kv_cache=cache,
        batch=batch,
        s_aux=None,
        position_ids=torch.zeros(1),
        use_cache=False,
    )


def test_a_mask_from_outside_is_refused() -> None:
    """transformers would send one only if the mask function were registered, and then it would be ignored."""
    cache, batch, query, key, value, _ = case(2, [6], 2)
    mask: Any = torch.zeros(1, 1, 2, 6)
    with pytest.raises(CheckpointError, match="mask"):
        paged_attention(LAYER, query, key, value, mask, kv_cache=cache, batch=batch)
