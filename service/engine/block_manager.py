"""Reference-counted blocks of the KV pool, with a prefix cache over full ones.

Pure Python, block numbers only: the tensors are in model/kv_cache.py, the cache keys come from block_keys.py.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import chain
from typing import TypeAlias

BlockTable: TypeAlias = "array[int]"  # the blocks of a stream, in order; an array, so that a batch takes it by memcpy


def table_of(blocks: Iterable[int] = ()) -> BlockTable:
    """A block table of these blocks."""
    return array("q", blocks)


class BlockManager:
    """Allocates block numbers 0 .. num_blocks - 1 and counts how many streams hold each.

    A full block may be cached under the key of its contents (block_keys.py). It is then never written again, and other
    streams may hold it as well. Once its last holder has released it, it is evictable: still found by its key until
    the memory is needed, least recently used first. A block that is not cached returns to the free list.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers, recently used, first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached blocks nobody holds, longest unused first
        self._holders = [0] * num_blocks
        self._keys: dict[int, bytes] = {}  # of cached blocks
        self._cached: dict[bytes, int] = {}  # the same, by key

    @property
    def free(self) -> int:
        """Blocks nobody holds, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def used(self) -> int:
        """Blocks somebody holds."""
        return self.num_blocks - self.free

    def blocks_for(self, positions: int) -> int:
        """Blocks that `positions` positions of one stream fill."""
        return -(-positions // self.block_size)

    def missing(self, table: BlockTable, positions: int) -> int:
        """Blocks that a stream with `table` still needs for `positions` positions."""
        return max(0, self.blocks_for(positions) - len(table))

    def extend(self, table: BlockTable, positions: int) -> None:
        """Allocates blocks to `table`, in place, up to `positions` positions. The caller has checked `free` first."""
        for _ in range(self.missing(table, positions)):
            block = self._free.pop() if self._free else self._evict()
            self._holders[block] = 1
            table.append(block)

    def cache(self, block: int, key: bytes) -> None:
        """Caches a held, full block under `key`, unless another block with these contents is cached already."""
        if key not in self._cached:
            self._cached[key] = block
            self._keys[block] = key

    def forget(self, *tables: BlockTable) -> None:
        """Removes held blocks from the cache; their holders keep them. Blocks that are not cached are ignored."""
        for block in chain(*tables):
            key = self._keys.pop(block, None)
            if key is not None:
                del self._cached[key]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of `keys`."""
        found: list[int] = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def evictable(self, blocks: Iterable[int]) -> int:
        """How many of these cached blocks nobody holds: holding them makes `free` smaller."""
        return sum(self._holders[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> BlockTable:
        """Adds a holder to each of `blocks`, which must be cached. Returns them as a new table."""
        table = table_of(blocks)
        for block in table:
            self._holders[block] += 1
            self._evictable.pop(block, None)
        return table

    def release(self, *tables: BlockTable) -> None:
        """Releases every block of `tables`, the streams of one sequence, and empties the tables.

        Last blocks first, in all streams, so that they are evicted first: a prefix is found without its end, but an
        end is never found without its prefix.
        """
        for depth in range(max(map(len, tables)) - 1, -1, -1):
            for table in tables:
                if depth < len(table):
                    self._release_block(table[depth])
        for table in tables:
            del table[:]

    def _release_block(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._keys:
            self._evictable[block] = None
        else:
            self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._cached[self._keys.pop(block)]
        return block

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raises RuntimeError unless holders, free list and cached blocks agree with `tables`, which are all tables."""
        held = Counter(block for table in tables for block in table)
        if [held[block] for block in range(self.num_blocks)] != self._holders:
            raise RuntimeError("block holders do not match the block tables")
        unheld = sorted([*self._free, *self._evictable])
        if unheld != [block for block in range(self.num_blocks) if not held[block]]:
            raise RuntimeError("the free list does not match the block tables")
        if {block: key for key, block in self._cached.items()} != self._keys:
            raise RuntimeError("the cached blocks do not match their keys")
        if not self._evictable.keys() <= self._keys.keys() or self._keys.keys() & set(self._free):
            raise RuntimeError("a block is evictable without a key, or free with one")
