"""The paged KV cache: keys, values and gate rows, in one pool of blocks for both streams of all requests.

    keys, values   per layer [blocks, block_size, kv_heads, head_dim]
    gate_rows      [slots + 1, S, E] fp32, by slot; the last is the checkpoint's dummy row

A slot is block * block_size + offset. The gate row of a position is in its real-stream slot; a request's own dummy row
is in the first slot of its scaling stream. The block manager assigns all blocks but the last, the scratch block: its
first slot takes values that nobody reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CACHE_LINE = 64  # bytes


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one block, and its size in bytes."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    gate_sites: int
    experts: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of every layer, plus a gate row per slot."""
        return (self.kv_slot_bytes + self.gate_row_bytes) * self.block_size

    @property
    def kv_slot_bytes(self) -> int:
        """Bytes of the keys and values of one position."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def gate_row_bytes(self) -> int:
        """Bytes of the gate row of one position."""
        return 4 * self.gate_sites * self.experts

    def blocks_for(self, tokens: int) -> int:
        """Blocks of one request with `tokens` positions, in both streams."""
        return 2 * -(-tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class KVCache:
    """The cache's tensors. Unused slots may hold anything, even NaN: attention backends never read them."""

    keys: list[Tensor]
    values: list[Tensor]
    gate_rows: Tensor

    @classmethod
    def allocate(cls, layout: KVLayout, num_blocks: int, dummy_row: Tensor) -> KVCache:
        """Allocates a cache on the device of `dummy_row` [S, E], the checkpoint's gate row of the scaling pass."""
        shape = (num_blocks + 1, layout.block_size, layout.kv_heads, layout.head_dim)
        keys, values = ([_zeros(shape, layout.dtype, dummy_row.device) for _ in range(layout.layers)] for _ in range(2))
        slots = shape[0] * shape[1]
        gate_rows = _zeros((slots + 1, layout.gate_sites, layout.experts), torch.float32, dummy_row.device)
        gate_rows[-1] = dummy_row
        return cls(keys, values, gate_rows)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, with the scratch block and the dummy row."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, self.gate_rows))

    @property
    def num_blocks(self) -> int:
        """Blocks without the scratch block."""
        return self.keys[0].shape[0] - 1

    @property
    def block_size(self) -> int:
        """Positions in a block."""
        return self.keys[0].shape[1]

    @property
    def scratch_slot(self) -> int:
        """The slot for keys, values and scalings that nobody reads."""
        return self.num_blocks * self.block_size

    @property
    def dummy_slot(self) -> int:
        """The slot of the checkpoint's dummy row, the gate row of the scaling pass."""
        return self.gate_rows.shape[0] - 1

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes key and value [T, kv_heads, head_dim] of T rows into `slots` [T]."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def read(self, layer: int, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values [N, length, kv_heads, head_dim] of N streams with block_table [N, blocks]."""
        key = self._gather(self.keys[layer], block_table, length)
        return key, self._gather(self.values[layer], block_table, length)

    def _gather(self, pool: Tensor, block_table: Tensor, length: int) -> Tensor:
        blocks = pool.index_select(0, block_table.flatten())
        return blocks.view(block_table.shape[0], -1, *pool.shape[2:])[:, :length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU they take memory only once they are written to, because NumPy allocates them with calloc."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _CACHE_LINE, np.uint8))
    first = -memory.data_ptr() % _CACHE_LINE
    return memory[first : first + size].view(dtype).view(shape)
