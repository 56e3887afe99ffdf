"""The open connections of one server: looked at once in a while, so that each ends when its time is over, and let go,
idlest first, when descriptors run short. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from typing import Protocol

LOOK_SECONDS = 1.0
RESERVED_DESCRIPTORS = 16  # for files, and for the pipes of processes, that the server opens by itself


class Connection(Protocol):
    """A connection as it is looked at."""

    def look(self, now: float) -> None:
        """Ends it when one of its times is over; `now` is the event loop's."""

    def let_go(self) -> bool:
        """Ends it at once, unless its peer still has something to take; whether it did."""


class OpenConnections:
    """All connections of one server. They are on one event loop.

    One timer looks at all of them: a timer of each connection's own would have to be set and cancelled several times
    with every request.
    """

    def __init__(self, look_seconds: float = LOOK_SECONDS, max_descriptors: int | None = None) -> None:
        """`look_seconds` is how late a connection may end; `max_descriptors` is the process's soft limit by default."""
        self._look_seconds = look_seconds
        self._max_descriptors = descriptor_limit() if max_descriptors is None else max_descriptors
        self._connections: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # those without a whole request in progress, idlest first
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Connection) -> None:
        self._connections.add(connection)
        self.mark_idle(connection)
        if self._timer is None:
            self._look()

    def discard(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)

    def mark_idle(self, connection: Connection) -> None:
        """It has no whole request in progress, from now on. What it sends of the next one changes nothing."""
        self._idle.pop(connection, None)
        self._idle[connection] = None

    def mark_busy(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def make_room(self, descriptor: int) -> None:
        """One with this number is about to come. The kernel gives the lowest free one: a high one tells of want."""
        if descriptor >= self._max_descriptors - RESERVED_DESCRIPTORS:
            self.let_idlest_go()

    def let_idlest_go(self) -> None:
        """Ends that which has been idle longest, where there is one."""
        for connection in list(self._idle):
            if connection.let_go():
                self._idle.pop(connection, None)
                return

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self._connections):
            connection.look(loop.time())
        self._timer = loop.call_later(self._look_seconds, self._look) if self._connections else None


def descriptor_limit() -> int:
    """The file descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
