"""The operators of kernels/: what they compute, and how steps come to call them.

    decode_linear            y = W x + b, and from row `first_row` on + B ((A x) * g)
    decode_siblings          the same for several linears that read the same x, with joint W, b, A and g
    decode_self_attention    one query row per stream over the keys and values of its blocks, read where they lie, after
                             it has written the rows' own
    decode_rotate            RoPE
    decode_norm              y = x / sqrt(mean(x^2) + eps) * weight
    decode_spread            the stored scalings of rows, at every rank
    decode_scalings          the classifier, and its scalings into where they are stored
    decode_drafting          rows as the head is to see them (draft_head.py)
    decode_layer             a whole decoder layer of the commonest kind, made of all of these (fused_decoder.py)

They stand in for what linear.py, siblings.py, attention.py, rotation.py and norms.py say in operators of torch, where
the library is there (kernel_library.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from service.model.batch import Batch
from service.model.gate import Kernels
from service.model.kv_cache import KVCache

DTYPES = (torch.float32, torch.bfloat16)
# Up to how many rows linears, experts included, are no slower with these than with torch's (in the demo; plain
# products of 4096 x 4096 are 13 % slower at 128). Narrow weights torch would widen first.
MOST_ROWS = {torch.float32: 128, torch.bfloat16: 16}

_new_library: Any = torch.library.Library  # has no types
_library = _new_library("xlora", "DEF")
_library.define(
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b_t, Tensor? gate, int first_row)"
    " -> Tensor"
)
_library.define(
    "decode_siblings(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor[] b_t, Tensor gate, int first_row)"
    " -> Tensor"
)
_library.define(
    "decode_self_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots,"
    " Tensor block_table, Tensor positions, float scaling, int window, float softcap) -> Tensor"
)
_library.define("decode_rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor")
_library.define("decode_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define(
    "decode_layer(Tensor x, Tensor[] tensors, Tensor? gate, int[] gate_offsets, int first_row, Tensor cos, Tensor sin,"
    " Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor block_table, Tensor positions, float eps, float scaling,"
    " int window) -> Tensor"
)
_library.define(
    "decode_spread(Tensor gate_rows, Tensor slots, Tensor rank_index, int first_row, float weight) -> Tensor"
)
_library.define(
    "decode_scalings(Tensor hidden, Tensor[] layers, bool relu, float? temperature, Tensor(a!) gate_rows, Tensor slots,"
    " int rows) -> Tensor"
)
_library.define("decode_drafting(Tensor hidden, Tensor rows, int scaling_rows, Tensor[] tensors) -> Tensor")
_decode_linear = torch.ops.xlora.decode_linear.default
_decode_siblings = torch.ops.xlora.decode_siblings.default
_decode_self_attention = torch.ops.xlora.decode_self_attention.default
_decode_rotate = torch.ops.xlora.decode_rotate.default
_decode_norm = torch.ops.xlora.decode_norm.default
_decode_layer = torch.ops.xlora.decode_layer.default
_decode_spread = torch.ops.xlora.decode_spread.default
_decode_scalings = torch.ops.xlora.decode_scalings.default
_decode_drafting = torch.ops.xlora.decode_drafting.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear."""
    return adapted_linear(x, weight, bias, None, None, None, 0)


def adapted_linear(
    x: Tensor,  # [..., T, in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    a: Tensor | None,  # [R, in]
    b_t: Tensor | None,  # [R, out]
    gate: Tensor | None,  # [T - first_row, R]
    first_row: int,
) -> Tensor:
    """XLoraLinear's forward as one call: [..., T, out]."""
    y: Tensor = _decode_linear(x.contiguous(), weight, bias, a, b_t, gate, first_row)
    return y


def siblings(
    x: Tensor,  # [..., T, in]
    weight: Tensor,  # [sum of outs, in]
    bias: Tensor | None,  # [sum of outs]
    a: Tensor,  # [sum of ranks, in]
    b_t: Sequence[Tensor],  # [rank, out] of each
    gate: Tensor,  # [T - first_row, sum of ranks]
    first_row: int,
) -> Tensor:
    """What Siblings compute, as one call: [..., T, sum of outs]."""
    y: Tensor = _decode_siblings(x.contiguous(), weight, bias, a, b_t, gate, first_row)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of pairs half a head apart: x [1, heads, T, head_dim], cos and sin [1, T, head_dim] -> as x."""
    y: Tensor = _decode_rotate(x, cos, sin)
    return y


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm's forward as one call: x [..., H] -> y [..., H]."""
    y: Tensor = _decode_norm(x.contiguous(), weight, eps)
    return y


def layer(
    x: Tensor,  # [1, T, H]
    tensors: Sequence[Tensor],  # fused_decoder.py has their order
    gate: Tensor | None,  # [T - first_row, sum of all ranks]
    gate_offsets: Sequence[int],  # where the ranks of each linear begin in it
    first_row: int,
    cos: Tensor,  # [1, T, head_dim]
    sin: Tensor,  # [1, T, head_dim]
    batch: Batch,
    number: int,
    kv_cache: KVCache,
    eps: float,
    scaling: float,
    window: int | None,
) -> Tensor:
    """A decoder layer of a batch whose rows attend alone, with the writing of their keys and values: [1, T, H]."""
    [group] = batch.groups
    pool = kv_cache.keys[number], kv_cache.values[number]
    y: Tensor = _decode_layer(
        *(x, tensors, gate, gate_offsets, first_row, cos, sin, *pool, batch.kv_slots, group.block_table),
        *(batch.positions, eps, scaling, window or 0),
    )
    return y


def spread(gate_rows: Tensor, slots: Tensor, rank_index: Tensor, first_row: int, weight: float) -> Tensor:
    """gate_rows [slots, S, E], slots [T], rank_index [R] into a flattened [S, E] -> what is stored for the rows from
    `first_row` on, times `weight`, [T - first_row, R].
    """
    y: Tensor = _decode_spread(gate_rows, slots, rank_index, first_row, weight)
    return y


def scalings(
    hidden: Tensor,  # [T, H]
    layers: Sequence[Tensor],  # weight and bias of each linear, empty where it has none
    relu: bool,  # between them
    temperature: float | None,  # of the softmax; None: there is none
    gate_rows: Tensor,  # [slots, S, E]
    slots: Tensor,  # [T]
    rows: int,
) -> Tensor:
    """Classifier.logits of the first `rows` of `hidden`, [rows, S, E]; writes their scalings into `slots`."""
    y: Tensor = _decode_scalings(hidden, layers, relu, temperature, gate_rows, slots, rows)
    return y


def drafting(hidden: Tensor, rows: Tensor, scaling_rows: int, tensors: Sequence[Tensor]) -> Tensor:
    """`rows` [L] of hidden [T, H], of which the first `scaling_rows` are scaling rows -> what the head is to see of
    them, [L, H]. `tensors` are DraftHead's.
    """
    y: Tensor = _decode_drafting(hidden, rows, scaling_rows, tensors)
    return y


def self_attention(
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    batch: Batch,
    layer: int,
    kv_cache: KVCache,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of a batch whose rows attend alone, after writing their keys and values: [1, T, heads, head_dim]."""
    [group] = batch.groups
    pool = kv_cache.keys[layer], kv_cache.values[layer]
    attended: Tensor = _decode_self_attention(
        *(query, key, value, *pool, batch.kv_slots, group.block_table, batch.positions),
        *(scaling, window or 0, softcap or 0.0),
    )
    return attended


PREFILL = Kernels(spread=spread, scalings=scalings, drafting=drafting)
PREFILL_FEW_ROWS = replace(PREFILL, linear=adapted_linear, siblings=siblings, rotate=rotate, norm=norm)
DECODE_FEW_ROWS = replace(PREFILL_FEW_ROWS, layer=layer)
DECODE = replace(PREFILL, rotate=rotate, norm=norm, layer=layer)


def for_rows(rows: int, dtype: torch.dtype, *, rows_attend_alone: bool, is_narrow: bool) -> Kernels:
    """What computes a step of so many rows. `is_narrow`: there are weights that torch's products would want
    widened first.
    """
    few = is_narrow or rows <= MOST_ROWS[dtype]
    if rows_attend_alone:
        return DECODE_FEW_ROWS if few else DECODE
    return PREFILL_FEW_ROWS if few else PREFILL
