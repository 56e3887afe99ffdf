"""The memory of the engine: keys, values and gate rows in blocks shared by both streams of all requests.

    keys, values   per layer [blocks, block_size, kv_heads, head_dim]
    gate_rows      [blocks * block_size, S, E] fp32, indexed by the slots of the *real* stream

A slot is block * block_size + offset. Which block belongs to whom is the block manager's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one block, and what it costs."""

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
        keys_and_values = 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize
        gate_row = 4 * self.gate_sites * self.experts
        return (keys_and_values + gate_row) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks one request of `tokens` positions needs: two streams."""
        return 2 * -(-tokens // self.block_size)


class KVCache:
    """Allocated once, zeroed: a masked slot is multiplied by 0, so it must never hold NaN."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (num_blocks, layout.block_size, layout.kv_heads, layout.head_dim)
        self.keys = [torch.zeros(shape, dtype=layout.dtype, device=device) for _ in range(layout.layers)]
        self.values = [torch.zeros(shape, dtype=layout.dtype, device=device) for _ in range(layout.layers)]
        self.gate_rows = torch.zeros(num_blocks * layout.block_size, layout.gate_sites, layout.experts, device=device)

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
