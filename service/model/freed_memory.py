"""Freed memory in glibc, where the C library is glibc: kept for the next step, or given back."""

from __future__ import annotations

import ctypes

_MIB = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, where the C library is glibc.

    A step frees and takes the same megabytes of activations again; handed back to the kernel in between they cost a
    page fault per 4 KiB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # the largest there is
        mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB)


def return_freed_memory() -> None:
    """Has glibc, where the C library is glibc, give back what lies free between blocks that are in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
