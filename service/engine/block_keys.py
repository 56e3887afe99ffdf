"""Prefix cache keys: hashes of the contents of full KV blocks, by which later requests find them. Pure Python.

    key of block i = hash(key of block i - 1, the block's token ids),  key of block -1 = the stream's root

A root covers everything else that the contents depend on: which stream it is, the dummy row, the request's gate, and
the caller's salt. Hashes are BLAKE2b of 256 bits under a secret drawn at start, so callers cannot craft collisions.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b


class BlockKeys:
    """Computes the keys of one engine's blocks, under its own secret."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._secret = secrets.token_bytes(32)

    def root(self, *identity: object) -> bytes:
        """The root key of all streams with this identity (values that are distinguished by their repr)."""
        return self._hash(repr(identity).encode())

    def extend(self, keys: list[bytes], root: bytes, tokens: Sequence[int], count: int) -> None:
        """Extends `keys` in place to the keys of the first `count` blocks of a stream over `tokens`."""
        size = self._block_size
        for block in range(len(keys), count):
            contents = array("q", tokens[block * size : (block + 1) * size]).tobytes()
            keys.append(self._hash((keys[-1] if keys else root) + contents))

    def _hash(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=32, key=self._secret).digest()
