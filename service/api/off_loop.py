"""Work that may take long, away from the event loop. It helps where the work lets go of the interpreter's lock, or is
many small steps: a single long call that keeps the lock stops the loop from any thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

SHORT_TOKENS = 512  # whose texts, or whose part of an answer, take a few milliseconds


async def off_loop(work: Callable[[], _T], *, tokens: int) -> _T:
    """Does the work: here if it is about a few tokens, as a thread costs more than that, and else in a thread."""
    return work() if tokens <= SHORT_TOKENS else await asyncio.to_thread(work)
