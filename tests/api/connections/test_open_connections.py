"""Short of descriptors, the idlest connection goes; and all are looked at as long as there are some."""

from __future__ import annotations

import asyncio
import resource

from service.api.connections.open_connections import RESERVED_DESCRIPTORS, OpenConnections, descriptor_limit
from tests.support.waiting import wait_for

LIMIT = 64
FREE = LIMIT - RESERVED_DESCRIPTORS - 1  # the highest descriptor that is no sign of want


class Connection:
    def __init__(self, holds: bool = False) -> None:
        self.holds = holds
        self.gone = False
        self.looks: list[float] = []

    def look(self, now: float) -> None:
        self.looks.append(now)

    def let_go(self) -> bool:
        self.gone = not self.holds
        return self.gone


class Book(OpenConnections):
    """`come` is what an acceptor does."""

    def come(self, descriptor: int = FREE, holds: bool = False) -> Connection:
        self.make_room(descriptor)
        self.add(connection := Connection(holds))
        return connection


def gone(*connections: Connection) -> list[bool]:
    return [one.gone for one in connections]


def test_the_idlest_goes_when_descriptors_run_short() -> None:
    """One for each that comes; not the newcomer, and not twice the same."""

    async def scene() -> None:
        book = Book(max_descriptors=LIMIT)
        first, second, third = book.come(), book.come(), book.come()
        book.mark_busy(first)
        assert gone(first, second, third) == [False, False, False]
        newcomer = book.come(FREE + 1)
        assert gone(first, second, third, newcomer) == [False, True, False, False]
        book.mark_idle(first)
        book.come(FREE + 9)
        assert gone(first, third, newcomer) == [False, True, False]
        book.come(LIMIT)
        assert gone(first, newcomer) == [False, True]  # `first` has just had an answer
        book.discard(first)
        book.come(LIMIT)
        assert gone(first) == [False]

    asyncio.run(scene())


def test_who_is_answered_or_has_an_answer_to_take_stays() -> None:
    async def scene() -> None:
        book = Book(max_descriptors=LIMIT)
        busy, taking, idle = book.come(), book.come(holds=True), book.come()
        book.mark_busy(busy)
        for _ in range(5):
            one = book.come(FREE + 1)
            book.mark_busy(one)
        assert gone(busy, taking, idle, one) == [False, False, True, False]

    asyncio.run(scene())


def test_all_are_looked_at_as_long_as_there_are_some() -> None:
    async def scene() -> None:
        book = Book(look_seconds=0.01)
        one, other = book.come(), book.come()
        assert await asyncio.to_thread(wait_for, lambda: min(len(one.looks), len(other.looks)) > 2)
        assert one.looks == sorted(one.looks)
        book.discard(one)
        book.discard(other)
        await asyncio.sleep(0.05)
        seen = len(other.looks)
        await asyncio.sleep(0.05)
        assert len(other.looks) == seen
        book.add(other)
        assert await asyncio.to_thread(wait_for, lambda: len(other.looks) > seen)

    asyncio.run(scene())


def test_the_limit_is_the_process_s_own() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert descriptor_limit() == soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        assert descriptor_limit() == soft - 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
