"""The reference backend: torch's scaled_dot_product_attention over copies of each stream's blocks.

Works on any device, for any shape. Other backends are compared with it, and it runs where they cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache


def sdpa(
    rows: Tensor,  # [N * Q, heads, head_dim]
    group: AttentionGroup,
    layer: int,
    kv_cache: KVCache,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one group's rows over copies of their blocks (Backend): the reference, on any device."""
    key, value = kv_cache.read(layer, group.block_table, group.keys)
    unused = group.unused()
    if unused is not None:  # a weight of 0 does not hide NaN
        for copy in (key, value):
            copy.masked_fill_(unused[..., None, None], 0.0)
    key, value = key.transpose(1, 2), value.transpose(1, 2)  # [N, kv_heads, L, head_dim]
    mask = group.mask(window, rows.dtype)
    heads, head_dim = rows.shape[1:]
    if group.queries == 1 and softcap is None:
        # The query heads of one KV head are the queries of one attention: no repeated keys, no transposes.
        query = rows.view(group.segments, key.shape[1], -1, head_dim)
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling).reshape(-1, heads, head_dim)
    query = rows.view(group.segments, group.queries, heads, head_dim).transpose(1, 2)
    if softcap is not None:
        out = _softcapped_attention(query, key, value, mask, scaling, softcap)
    else:
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=heads != key.shape[1])
    return out.transpose(1, 2).reshape(-1, heads, head_dim)


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """softmax(softcap * tanh(q k / softcap)) v, as Gemma 2 has it; SDPA has no such option."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
