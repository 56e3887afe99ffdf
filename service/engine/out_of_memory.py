"""OutOfMemory: one error for all the ways in which torch, CUDA and Python report that memory has run out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# RuntimeErrors by message: torch's CPU allocator, and CUDA calls that allocate themselves, as for pinned memory.
_MESSAGES = ("can't allocate memory", "CUDA error: out of memory")


class OutOfMemory(Exception):
    """A step needs more memory than there is."""


@contextmanager
def recognised() -> Iterator[None]:
    """A context that turns errors of torch, CUDA and Python into OutOfMemory where they mean it; others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(message in str(error) for message in _MESSAGES)
