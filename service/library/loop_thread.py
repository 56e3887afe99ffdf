"""An event loop in a thread of its own, so that any thread can wait for what runs there: also one whose own loop runs.

This file knows no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from service.contract.errors import XLoraError

_T = TypeVar("_T")


class LoopThread:
    """One loop, from construction to `close`."""

    def __init__(self, closed_error: Callable[[], XLoraError]) -> None:
        """`closed_error` makes what is raised after the end."""
        self._closed_error = closed_error
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="xlora", daemon=True)
        self._open = True
        self._opening = threading.Lock()  # held while something is submitted or the end begins
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether something may be submitted: not after `close`, nor in a child of os.fork: it has no threads."""
        return self._open and self._thread.is_alive()

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begins some work; cancelling the future cancels the work. Raises the error of the closed."""
        with self._opening:
            if not self.is_open:
                work.close()
                raise self._closed_error()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Waits for some work, which is cancelled where the waiting is interrupted."""
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs the last work, cancels all other, and ends the thread. Later calls do nothing."""
        with self._opening:
            if not self.is_open:
                return
            self._open = False
        if threading.current_thread() is self._thread:  # a collection of garbage here has found the owner
            threading.Thread(target=self._end, args=(last,), name="xlora-end").start()
        else:
            self._end(last)

    def _end(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def ending() -> None:
            await last()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.get_running_loop().shutdown_asyncgens()

        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(ending(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
