"""Many prompts through a bounded window: pulled when there is room, answered in order or as they come.

What is in flight is cancelled when the iterator is left early, whatever the reason. This file knows no prompts.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")
_END: Any = object()


def in_order(begin: Callable[[_Item], Future[_Answer]], items: Iterable[_Item], window: int) -> Iterator[_Answer]:
    """The answers in the order of the items. At most `window` items are begun and not handed out.

    One item is pulled for each answer, and more only while no answer is there: a slow source delays none by more than
    one item.
    """
    source, waiting = iter(items), deque[Future[_Answer]]()
    try:
        while True:
            while len(waiting) < window and (item := next(source, _END)) is not _END:
                waiting.append(begin(item))
                if waiting[0].done():
                    break
            if not waiting:
                return
            answer = waiting[0].result()
            waiting.popleft()
            yield answer
    finally:
        for future in waiting:
            future.cancel()


def as_they_come(begin: Callable[[_Item], Future[_Answer]], items: Iterable[_Item], window: int) -> Iterator[_Answer]:
    """The answers in the order in which they are there, with the same bound."""
    source, waiting = iter(items), set[Future[_Answer]]()
    done: queue.SimpleQueue[Future[_Answer]] = queue.SimpleQueue()
    try:
        while True:
            while len(waiting) < window and (item := next(source, _END)) is not _END:
                future = begin(item)
                waiting.add(future)
                future.add_done_callback(done.put)
                if not done.empty():
                    break
            if not waiting:
                return
            first = done.get()
            waiting.discard(first)
            yield first.result()
    finally:
        for future in waiting:
            future.cancel()


async def asynchronously(
    begin: Callable[[_Item], Future[_Answer]],
    items: Iterable[_Item] | AsyncIterable[_Item],
    window: int,
    *,
    ordered: bool,
) -> AsyncIterator[_Answer]:
    """The same on the caller's event loop. Answers do not wait for an asynchronous source's next item."""
    source = _each(items)
    waiting: list[asyncio.Future[_Answer]] = []
    pulled: asyncio.Future[_Item] | None = None
    ended = False
    try:
        while True:
            if pulled is None and not ended and len(waiting) < window:
                pulled = asyncio.ensure_future(_next(source))
            wanted = waiting[:1] if ordered else waiting
            if pulled is None and not wanted:
                return
            awaited: list[asyncio.Future[Any]] = [*wanted] if pulled is None else [*wanted, pulled]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if pulled is not None and pulled.done():
                item, pulled = pulled.result(), None
                ended = item is _END
                if not ended:
                    waiting.append(asyncio.wrap_future(begin(item)))
                continue
            first = next(future for future in wanted if future.done())
            waiting.remove(first)
            yield first.result()
    finally:
        for future in waiting:
            future.cancel()
        if pulled is not None:
            pulled.cancel()


async def _each(items: Iterable[_Item] | AsyncIterable[_Item]) -> AsyncIterator[_Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _next(source: AsyncIterator[_Item]) -> _Item:
    return await anext(source, _END)
