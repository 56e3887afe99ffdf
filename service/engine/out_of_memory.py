"""One error for a step that needs more memory than there is, whoever raised it: torch, CUDA's allocators or Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Torch's allocator on a CPU; a CUDA call that allocates itself, as for pinned memory, has no exception of its own.
_SAYINGS = ("can't allocate memory", "CUDA error: out of memory")


class OutOfMemory(Exception):
    """A step needs more memory than there is."""


@contextmanager
def told_apart() -> Iterator[None]:
    """Raises OutOfMemory in place of what says so in its own way; lets everything else through."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(saying in str(error) for saying in _SAYINGS)
