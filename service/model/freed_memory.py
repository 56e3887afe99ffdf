"""Settings of glibc's malloc: keeps freed memory for the next step, or returns it to the kernel after loading.

Used on every device, because host memory matters on all of them. Without effect where the C library is another.
"""

from __future__ import annotations

import ctypes

_MIB = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory.

    A step frees and allocates the same megabytes of activations as the one before. If malloc returned them to the
    kernel in between, they would cost a page fault per 4 KiB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # glibc's maximum
        mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB)


def return_freed_memory() -> None:
    """Makes malloc return free memory between blocks in use to the kernel."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
