"""Attention over the paged KV cache, registered with transformers' AttentionInterface under the name ATTENTION.

One function serves every decoder family that uses the interface. We register no mask function, so the mask arrives as
None, and the backends mask: causally within a row's own stream, with the layer's sliding window where it has one. Any
other argument that would change attention is refused by name, not ignored.

The backend is the reference on a CPU (reference.py), and the fastest that works on CUDA (backends.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from service.contract.errors import CheckpointError
from service.model.attention.backends import Backend, Shape, cuda_backend
from service.model.attention.reference import sdpa
from service.model.batch import Batch
from service.model.kv_cache import KVCache

ATTENTION = "xlora_paged"

# Arguments that decoders pass and that do not change the result here: positions are already applied to the keys (RoPE),
# and the KV cache is our own.
HARMLESS = {
    *("position_ids", "cache_position", "use_cache", "output_attentions", "is_causal", "position_embeddings"),
    "output_router_logits",
}
# Arguments that change the result, and are supported.
KNOWN = {"scaling", "dropout", "sliding_window", "softcap"}


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: None,
    *,
    kv_cache: KVCache,
    batch: Batch,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Writes the rows' keys and values, then attends group by group. Returns ([1, T, heads, head_dim], None).

    Raises CheckpointError for an argument that would change attention in a way this function does not know.
    """
    unknown = [name for name, given in kwargs.items() if given is not None and name not in HARMLESS]
    if unknown or attention_mask is not None:
        raise CheckpointError(
            f"the base model's attention uses {', '.join(unknown) or 'a mask of its own'}, which is not supported",
            hint="the decoder family cannot be served exactly yet",
        )
    layer = module.layer_idx
    assert isinstance(layer, int)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    kv_cache.write(layer, batch.kv_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    rows = query[0].transpose(0, 1)  # [T, heads, head_dim]
    attend = backend_for(rows, kv_cache, sliding_window, softcap)
    outputs = []
    for group in batch.groups:
        own = rows[group.start : group.start + group.segments * group.queries]
        outputs.append(attend(own, group, layer, kv_cache, scaling, sliding_window, softcap))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def backend_for(rows: Tensor, kv_cache: KVCache, window: int | None = None, softcap: float | None = None) -> Backend:
    """The backend for rows [n, heads, head_dim] over this cache."""
    if not rows.is_cuda:
        return sdpa
    heads, head_dim = rows.shape[1:]
    kv_heads = kv_cache.keys[0].shape[2]
    return cuda_backend(Shape(rows.device, rows.dtype, heads, kv_heads, head_dim, kv_cache.block_size, window, softcap))


AttentionInterface.register(ATTENTION, paged_attention)
