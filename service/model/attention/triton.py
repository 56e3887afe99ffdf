"""Paged attention as a Triton kernel: reads block tables, copies no keys, and never waits for the host.

One program computes a tile of (query, query head) pairs of one KV head, so grouped heads read every key once, and
decode (Q = 1) and prefill use the same code. Where there are too few tiles to fill the device, the keys of each are
split, and a second, small kernel joins the parts. Supports sliding windows, soft caps, any block size, heads up to 256.

Importing it needs triton. With TRITON_INTERPRET=1 it runs on the CPU, which is how it is tested without a GPU.
"""
# No `from __future__ import annotations`: Triton's interpreter compares annotations with tl.constexpr itself.

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.model.batch import AttentionGroup
from service.model.kv_cache import KVCache

_MAX_SPLITS = 32
_MIN_KEYS_PER_SPLIT = 128  # with fewer, joining costs more than splitting saves
_INTERPRETED_PROCESSORS = 16
# Arguments that differ from step to step. Triton would compile the kernel again, while serving, when a number becomes 1
# or a multiple of 16, or when a view of the batch's indices happens to begin at a multiple of 16 bytes.
_UNSPECIALIZED = [
    *("block_table", "positions", "window", "queries", "splits", "rows", "table_stride", "position_stride"),
]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attend_kernel(
    query,  # [rows, heads, head_dim], strided
    keys,  # [blocks, PAGE, KV_HEADS, HEAD_DIM]
    values,
    block_table,  # int64 [segments, blocks of a segment]
    positions,  # int64 [segments, queries], consecutive in a segment
    out,  # [rows, heads, HEAD_DIM], or fp32 [splits, rows, heads, HEAD_DIM]
    log_sums,  # fp32 [splits, rows, heads]: log of the sum of exp(score) over a split's keys
    scaling,
    softcap,
    window,
    queries,
    splits,
    rows,
    query_row_stride,
    query_head_stride,
    table_stride,
    position_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,  # (query, head) pairs
    TILE_KEYS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_pair = tl.program_id(0) * TILE
    segment = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)

    pair = first_pair + tl.arange(0, TILE)
    local = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    row = segment * queries + local
    is_row = local < queries
    dim = tl.arange(0, TILE_DIM)
    is_dim = dim < HEAD_DIM

    first_position = tl.load(positions + segment * position_stride).to(tl.int32)
    position = first_position + local
    last_local = tl.minimum((first_pair + TILE - 1) // GROUP, queries - 1)
    end = first_position + last_local + 1
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_position + first_pair // GROUP - window + 1, 0) // TILE_KEYS * TILE_KEYS
    split_keys = tl.cdiv(tl.cdiv(end - begin, TILE_KEYS), splits) * TILE_KEYS
    begin += split * split_keys
    end = tl.minimum(begin + split_keys, end)

    at = row[:, None] * query_row_stride + head[:, None] * query_head_stride + dim[None, :]
    q = tl.load(query + at, mask=is_row[:, None] & is_dim[None, :], other=0.0)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, TILE_DIM], tl.float32)
    for start in range(begin, end, TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        is_key = key < end
        block = tl.load(block_table + segment * table_stride + key // PAGE, mask=is_key, other=0)
        slot = block.to(tl.int64) * PAGE + key % PAGE
        at_key = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
        is_loaded = is_key[:, None] & is_dim[None, :]
        k = tl.load(keys + at_key, mask=is_loaded, other=0.0)
        v = tl.load(values + at_key, mask=is_loaded, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        if HAS_SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh
        visible = is_key[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible &= key[None, :] > position[:, None] - window
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # all keys of a tile may be masked for a row
        weight = tl.exp(score - finite[:, None])
        decay = tl.exp(best - finite)
        total = total * decay + tl.sum(weight, 1)
        mixed = mixed * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        best = higher

    total = tl.where(total == 0.0, 1.0, total)  # all keys of the split are masked for the row: best is -inf
    mixed = mixed / total[:, None]
    place = row * (KV_HEADS * GROUP) + head
    if IS_SPLIT:
        place += split * rows * (KV_HEADS * GROUP)
        tl.store(log_sums + place, best + tl.log(total), mask=is_row)
    stored = mixed.to(out.dtype.element_ty)
    tl.store(out + place[:, None] * HEAD_DIM + dim[None, :], stored, mask=is_row[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["splits", "lines"])
def _join_kernel(
    parts,  # fp32 [splits, lines, HEAD_DIM]
    log_sums,  # fp32 [splits, lines]
    out,  # [lines, HEAD_DIM]
    splits,
    lines,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    line = tl.program_id(0)
    split = tl.arange(0, MAX_SPLITS)
    dim = tl.arange(0, TILE_DIM)
    is_split = split < splits
    log_sum = tl.load(log_sums + split * lines + line, mask=is_split, other=float("-inf"))
    weight = tl.exp(log_sum - tl.max(log_sum, 0))  # one split has the row's own key, so the maximum is finite
    weight = weight / tl.sum(weight, 0)
    at = (split[:, None] * lines + line) * HEAD_DIM + dim[None, :]
    part = tl.load(parts + at, mask=is_split[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    joined = tl.sum(part * weight[:, None], 0)
    tl.store(out + line * HEAD_DIM + dim, joined.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


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
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    keys, values = kv_cache.keys[layer], kv_cache.values[layer]
    count, heads, head_dim = rows.shape
    page, kv_heads = keys.shape[1:3]
    per_kv_head = heads // kv_heads
    pairs = group.queries * per_kv_head
    tile_dim = max(16, triton.next_power_of_2(head_dim))
    tile, tile_keys, stages = _tiling(pairs, tile_dim, rows.dtype)
    tiles = triton.cdiv(pairs, tile)
    splits = _splits(tiles * group.segments * kv_heads, group.keys, _processors(rows.device))
    out = rows.new_empty(count, heads, head_dim)
    parts = rows.new_empty(splits, count, heads, head_dim, dtype=torch.float32) if splits > 1 else out
    log_sums = rows.new_empty(splits, count, heads, dtype=torch.float32) if splits > 1 else out
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _attend_kernel[(tiles, group.segments * kv_heads, splits)](
            rows,
            keys,
            values,
            group.block_table,
            group.positions,
            parts,
            log_sums,
            scaling,
            1.0 if softcap is None else softcap,
            0 if window is None else window,
            group.queries,
            splits,
            count,
            rows.stride(0),
            rows.stride(1),
            group.block_table.stride(0),
            group.positions.stride(0),
            KV_HEADS=kv_heads,
            GROUP=per_kv_head,
            HEAD_DIM=head_dim,
            PAGE=page,
            TILE=tile,
            TILE_KEYS=tile_keys,
            TILE_DIM=tile_dim,
            HAS_SOFTCAP=softcap is not None,
            HAS_WINDOW=window is not None,
            IS_SPLIT=splits > 1,
            PRECISION="ieee",  # no TF32 for fp32; without effect on 16-bit types
            num_warps=4,
            num_stages=stages,
        )
        if splits > 1:
            _join_kernel[(count * heads,)](
                parts,
                log_sums,
                out,
                splits,
                count * heads,
                HEAD_DIM=head_dim,
                TILE_DIM=tile_dim,
                MAX_SPLITS=_MAX_SPLITS,
                num_warps=4,
            )
    return out


def _tiling(pairs: int, tile_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Pairs per tile, keys per tile, and pipeline stages that fit shared memory (in fp32: and the registers).

    A tile of keys and one of values per stage must stay under the 100 KiB of Ampere's smaller chips.
    """
    if dtype == torch.float32:
        return 16, 32, 1 if tile_dim > 128 else 2
    tile = 16 if pairs <= 16 else 64
    tile_keys = 64 if tile_dim <= 128 else 32
    return tile, tile_keys, 2 if tile_dim >= 128 else 3


def _splits(programs: int, keys: int, processors: int) -> int:
    """The number of parts that each tile's keys are split into: two programs per processor, and no part too small."""
    return max(1, min(2 * processors // programs, keys // _MIN_KEYS_PER_SPLIT, _MAX_SPLITS))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
