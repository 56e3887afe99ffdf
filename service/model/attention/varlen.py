"""Paged attention by torch's own varlen_attn with block tables, where the installed torch has it and it works.

FlashAttention 2, which comes with torch, supports only block sizes that are multiples of 256, and in some versions no
block tables; FlashAttention 3 (torch.nn.attention.activate_flash_attention_impl) supports any. So `works` tries it.
varlen_attn supports no soft cap, no fp32, and only head sizes that are multiples of 8.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache

_MAX_HEAD_DIM = 256


def attend(
    rows: Tensor,  # [N * Q, heads, head_dim]
    group: AttentionGroup,
    layer: int,
    kv_cache: KVCache,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Computes attention of one group's rows over their streams (backends.Backend): [N * Q, heads, head_dim]."""
    assert softcap is None, "varlen_attn has no soft cap"
    offsets, lengths, table = group.varlen()
    return _varlen_attn()(
        rows.contiguous(),
        kv_cache.keys[layer],
        kv_cache.values[layer],
        offsets,
        None,
        group.queries,
        group.block_table.shape[1] * kv_cache.block_size,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=rows.shape[1] != kv_cache.keys[layer].shape[2],
        seqused_k=lengths,
        block_table=table,
    )


@functools.cache
def _varlen_attn() -> Callable[..., Tensor]:
    """torch's varlen_attn, imported only where it is used, because the import loads torch's compiler."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn  # type: ignore[return-value]  # returns a tuple only with return_aux


@functools.cache
def works(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int) -> bool:
    """Whether varlen_attn works for this shape of KV cache: tried with a tiny call in which unused slots hold NaN."""
    if dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > _MAX_HEAD_DIM:
        return False
    if "block_table" not in inspect.signature(_varlen_attn()).parameters:
        return False
    pool = torch.full((2, block_size, kv_heads, head_dim), torch.nan, dtype=dtype, device=device)
    pool[0, 0].zero_()
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    group = AttentionGroup(0, 1, 1, one, one, 1, needs_mask=False)
    try:
        found = attend(pool.new_zeros(1, heads, head_dim), group, 0, KVCache([pool], [pool], pool), 1.0, None, None)
        return bool(found.isfinite().all())
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
