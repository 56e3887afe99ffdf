"""The cache folder of compiled code: a lock for builders, and scratch folders to build in.

A file is built in a scratch folder and moved into place when it is complete. Knows nothing of what is built.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "compiling-"
_ABANDONED_SECONDS = 6 * 3600


@contextmanager
def alone_in(cache: Path) -> Iterator[None]:
    """Holds the folder's file lock: one process compiles, and the others wait for its result. Raises OSError."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # and with it the lock


@contextmanager
def scratch_in(cache: Path) -> Iterator[Path]:
    """A temporary folder on the cache's file system, from which os.replace can move the result. Removes folders that
    killed processes left behind long ago. Raises OSError.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(f"{_PREFIX}*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=_PREFIX) as scratch:
        yield Path(scratch)
