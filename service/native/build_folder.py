"""The folder of compiled code: what is being made in it is out of the way until it is whole."""

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
    """Waits until no other process is in here for this folder: what is quickly made need not be made by all at once.
    Raises OSError.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # and with it the lock


@contextmanager
def scratch_in(cache: Path) -> Iterator[Path]:
    """A folder on the cache's own file system, for os.replace to take the result from. Removes what processes that were
    killed long ago have left. Raises OSError.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(f"{_PREFIX}*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=_PREFIX) as scratch:
        yield Path(scratch)
