"""Who holds which block of the KV pool. Pure Python; the tensors behind the numbers are model/kv_cache.py's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class BlockManager:
    """Hands out block numbers 0 .. num_blocks - 1 and counts how many streams hold each.

    A block shared by several streams (choices of one prompt) is full and never written again; it returns to the
    free list when its last holder releases it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers, recently used, first
        self._holders = [0] * num_blocks

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks somebody holds."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, positions: int) -> int:
        """Blocks that `positions` positions of one stream fill."""
        return -(-positions // self.block_size)

    def missing(self, table: list[int], positions: int) -> int:
        """Blocks a stream with `table` lacks to hold `positions` positions."""
        return max(0, self.blocks_for(positions) - len(table))

    def extend(self, table: list[int], positions: int) -> None:
        """Grows `table` in place so that it holds `positions` positions. The caller has checked `free` first."""
        for _ in range(self.missing(table, positions)):
            block = self._free.pop()
            self._holders[block] = 1
            table.append(block)

    def share(self, blocks: Iterable[int]) -> list[int]:
        """Adds a holder to each of `blocks`, which must be full. Returns them as a new table."""
        table = list(blocks)
        for block in table:
            self._holders[block] += 1
        return table

    def release(self, table: list[int]) -> None:
        """Gives up every block of `table` and empties it. Releasing an empty table is a no-op."""
        for block in reversed(table):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)
        table.clear()

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Raises RuntimeError unless holders and free list are exactly what `tables` (all there are) say."""
        held = Counter(block for table in tables for block in table)
        if [held[block] for block in range(self.num_blocks)] != self._holders:
            raise RuntimeError("block holders do not match the block tables")
        if set(self._free) != {block for block in range(self.num_blocks) if not held[block]} or len(
            set(self._free)
        ) != len(self._free):
            raise RuntimeError("the free list does not match the block tables")
