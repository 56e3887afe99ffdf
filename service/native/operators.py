"""Schemas of the operators of csrc/ for torch.library, and typed wrappers around them.

Tensors are contiguous float32; weights of linears may be bfloat16.

    linear      y = W x + b, and from row `first_row` on + B ((A x) * g)
    norm        y = x / sqrt(mean(x^2) + eps) * weight
    layers      the decoder's layers, experts and attention over the paged KV cache included
    spread      stored scalings, expanded to the ranks of all experts
    scalings    the classifier; stores its scalings
    drafting    input rows of the language model's head; scaling rows pass the draft head
    draft_state     the draft layer's next state
    drafts          all drafts of the draft layer, chosen greedily or drawn

They can be called once the library is loaded (library.py). Each raises RuntimeError for tensors that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_new_library: Any = torch.library.Library  # torch has no types for it
_library = _new_library("xlora", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b_t, Tensor? gate, int first_row) -> Tensor"
)
_library.define("norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define(
    "layers(Tensor x, Tensor[] tensors, Tensor? gate, int[] gate_offsets, int first_row, Tensor cos, Tensor sin,"
    " Tensor(a!)[] keys, Tensor(b!)[] values, Tensor slots, Tensor positions, Tensor[] tables, int[] rows_each,"
    " float eps, float scaling, int[] windows) -> Tensor"
)
_library.define("spread(Tensor gate_rows, Tensor slots, Tensor rank_index, int first_row, float weight) -> Tensor")
_library.define(
    "scalings(Tensor hidden, Tensor[] layers, bool relu, float? temperature, Tensor(a!) gate_rows, Tensor slots,"
    " int rows) -> (Tensor, Tensor)"
)
_library.define("drafting(Tensor hidden, Tensor rows, int scaling_rows, Tensor[] tensors) -> Tensor")
_library.define(
    "draft_state(Tensor state, Tensor embedded, Tensor[] tensors, Tensor? cos, Tensor? sin, Tensor keys, Tensor values,"
    " Tensor positions, Tensor table, float eps) -> Tensor"
)
_library.define(
    "drafts(Tensor state, Tensor tokens, Tensor embedding, Tensor[] tensors, Tensor depths, Tensor cos,"
    " Tensor sin, Tensor keys, Tensor values, Tensor positions, Tensor table, Tensor head, Tensor? head_bias,"
    " Tensor? temperature, Tensor? noise_keys, float eps, int depth) -> Tensor"
)
_linear = torch.ops.xlora.linear.default
_norm = torch.ops.xlora.norm.default
_layers = torch.ops.xlora.layers.default
_spread = torch.ops.xlora.spread.default
_scalings = torch.ops.xlora.scalings.default
_drafting = torch.ops.xlora.drafting.default
_draft_state = torch.ops.xlora.draft_state.default
_drafts = torch.ops.xlora.drafts.default


def linear(
    x: Tensor,  # [T, in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
    a: Tensor | None = None,  # [R, in]
    b_t: Tensor | None = None,  # [R, out]
    gate: Tensor | None = None,  # [T - first_row, R]
    first_row: int = 0,
) -> Tensor:
    """An adapted linear: [T, out]."""
    y: Tensor = _linear(x, weight, bias, a, b_t, gate, first_row)
    return y


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [T, H]."""
    y: Tensor = _norm(x, weight, eps)
    return y


def layers(
    x: Tensor,  # [T, H]
    tensors: Sequence[Tensor],  # of all layers, in the order of decoder.Layer.tensors
    gate: Tensor | None,  # [T - first_row, sum of all ranks]; None: no experts
    gate_offsets: Sequence[int],  # the index of each linear's first rank in it
    first_row: int,
    cos: Tensor,  # [T, head_dim]
    sin: Tensor,  # [T, head_dim]
    keys: Sequence[Tensor],  # of each layer [blocks, block_size, kv_heads, head_dim]; written
    values: Sequence[Tensor],  # like `keys`
    slots: Tensor,  # int64 [T]: the slots that keys and values are written to
    positions: Tensor,  # int64 [T]
    tables: Sequence[Tensor],  # of each attention group, int64 [segments, blocks]
    rows_each: Sequence[int],  # of each attention group: rows of a segment, at consecutive positions
    eps: float,
    scaling: float,
    windows: Sequence[int],  # of each layer, in tokens; 0: none
) -> Tensor:
    """The last layer's hidden states [T, H]."""
    y: Tensor = _layers(
        *(x, tensors, gate, gate_offsets, first_row, cos, sin, keys, values, slots, positions, tables, rows_each),
        *(eps, scaling, windows),
    )
    return y


def spread(gate_rows: Tensor, slots: Tensor, rank_index: Tensor, first_row: int, weight: float) -> Tensor:
    """gate_rows [slots, S, E], slots [T], rank_index [R] into a flattened [S, E] -> the stored scalings of rows from
    `first_row` on, expanded to ranks and multiplied by `weight`, [T - first_row, R].
    """
    y: Tensor = _spread(gate_rows, slots, rank_index, first_row, weight)
    return y


def scalings(
    hidden: Tensor,  # [T, H]
    layers: Sequence[Tensor],  # weight and bias of each linear; empty: no bias
    relu: bool,  # between the linears
    temperature: float | None,  # of the softmax; None: no softmax
    gate_rows: Tensor,  # [slots, S, E]; written
    slots: Tensor,  # int64 [T]
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Classifier.logits of the first `rows` of `hidden`, and their scalings, both [rows, S, E]; stores the scalings."""
    found: tuple[Tensor, Tensor] = _scalings(hidden, layers, relu, temperature, gate_rows, slots, rows)
    return found


def drafting(hidden: Tensor, rows: Tensor, scaling_rows: int, tensors: Sequence[Tensor]) -> Tensor:
    """`rows` [L] of hidden [T, H], whose first `scaling_rows` are scaling rows -> the head's input, [L, H]. `tensors`
    are DraftHead's.
    """
    y: Tensor = _drafting(hidden, rows, scaling_rows, tensors)
    return y


def draft_state(
    state: Tensor,  # [n, H]
    embedded: Tensor,  # [n, H]
    tensors: Sequence[Tensor],  # mix and its bias at this depth, the norm's weight [H], query, output, U, b and D
    rotation: tuple[Tensor, Tensor] | None,  # cos and sin [n, head_dim]
    keys: Tensor,  # [blocks, block_size, kv_heads, head_dim]
    values: Tensor,
    positions: Tensor,  # int64 [n]: the last position that is attended to
    table: Tensor,  # int64 [n, blocks]
    eps: float,
) -> Tensor:
    """DraftLayer.forward: [n, H]."""
    cos, sin = rotation or (None, None)
    y: Tensor = _draft_state(state, embedded, tensors, cos, sin, keys, values, positions, table, eps)
    return y


def drafts(
    state: Tensor,  # [n, H]
    tokens: Tensor,  # int64 [n], the first drafts
    embedding: Tensor,  # [V, H]
    tensors: Sequence[Tensor],  # as of draft_state; the bias is replaced
    depths: Tensor,  # [depth - 1 or more, H], the bias at each depth
    cos: Tensor,  # [positions, head_dim]
    sin: Tensor,  # [positions, head_dim]
    keys: Tensor,  # [blocks, block_size, kv_heads, head_dim]
    values: Tensor,
    positions: Tensor,  # int64 [n]: the last position that is attended to
    table: Tensor,  # int64 [n, blocks]
    head: Tensor,  # [V, H]
    head_bias: Tensor | None,  # [V]
    temperature: Tensor | None,  # [n]; None, or 0: the largest logit
    noise_keys: Tensor | None,  # int64 [n, depth - 1]
    eps: float,
    depth: int,
) -> Tensor:
    """draft_tokens with a PureChoice: int64 [n, depth - 1]."""
    ids: Tensor = _drafts(
        *(state, tokens, embedding, tensors, depths, cos, sin, keys, values, positions, table, head, head_bias),
        *(temperature, noise_keys, eps, depth),
    )
    return ids.T.long()
