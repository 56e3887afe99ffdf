"""Attention over the paged KV cache, registered with transformers' AttentionInterface under the name ATTENTION.

One function serves every decoder family that uses the interface. transformers is given no mask function, so its mask
arrives as None and masking is ours: causal within a row's own stream, with the layer's sliding window where it has one.
Anything else that would change attention is refused by name rather than ignored.

Behind it is one backend per device: on a CPU scaled_dot_product_attention over gathered blocks, which is also the
reference; on CUDA torch's varlen_attn over block tables where it works (varlen.py), else our Triton kernel.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from service.contract.errors import CheckpointError
from service.model.attention import varlen
from service.model.batch import AttentionGroup, Batch
from service.model.kv_cache import KVCache

ATTENTION = "xlora_paged"


class Backend(Protocol):
    """Attention of one group's rows [N * Q, heads, head_dim] over their streams, whose keys and values are written."""

    def __call__(
        self,
        rows: Tensor,
        group: AttentionGroup,
        layer: int,
        kv_cache: KVCache,
        scaling: float,
        window: int | None,
        softcap: float | None,
        /,
    ) -> Tensor:
        """Returns [N * Q, heads, head_dim]. `window` is a sliding window in tokens; no softcap is None."""


triton_attend: Backend | None = None
if torch.version.cuda is not None and find_spec("triton") is not None:
    from service.model.attention import triton

    triton_attend = triton.attend

_LARGEST_TRITON_HEAD = 256  # more does not fit shared memory

# Arguments that decoders pass through and that do not change the result here: positions are already in the keys
# (RoPE), and the KV cache is ours.
HARMLESS = {
    *("position_ids", "cache_position", "use_cache", "output_attentions", "is_causal", "position_embeddings"),
    "output_router_logits",
}
# Arguments that change the result and that are honoured.
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
    attend = _backend(rows, key.shape[1], kv_cache.block_size, softcap)
    outputs = []
    for group in batch.groups:
        own = rows[group.start : group.start + group.segments * group.queries]
        outputs.append(attend(own, group, layer, kv_cache, scaling, sliding_window, softcap))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _backend(rows: Tensor, kv_heads: int, block_size: int, softcap: float | None) -> Backend:
    if not rows.is_cuda:
        return sdpa
    return cuda_backend(
        rows.device, rows.dtype, rows.shape[1], kv_heads, rows.shape[2], block_size, softcap is not None
    )


@functools.cache
def cuda_backend(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    has_softcap: bool,
) -> Backend:
    """The first that can compute this of torch's kernel, ours, and the reference."""
    if not has_softcap and varlen.works(device, dtype, heads, kv_heads, head_dim, block_size):
        return varlen.attend
    return triton_attend if triton_attend is not None and head_dim <= _LARGEST_TRITON_HEAD else sdpa


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


AttentionInterface.register(ATTENTION, paged_attention)
