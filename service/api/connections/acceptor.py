"""New connections, one in a turn of the event loop: when descriptors run short, an idle one has gone before the next
comes. Event loops by themselves take all that wait, and close them again where no descriptor is left. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable

from service.api.connections.open_connections import OpenConnections

HANDSHAKE_SECONDS = 20.0
_PAUSE_SECONDS = 0.05  # without a descriptor

logger = logging.getLogger("xlora")


class Acceptor:
    """One listening socket; to uvicorn, one of its servers."""

    def __init__(
        self,
        listener: socket.socket,
        protocols: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext | None,
        connections: OpenConnections,
    ) -> None:
        """`protocols` makes the protocol of a connection, which adds itself to `connections`."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._protocols = protocols
        self.context = context  # of the connections to come
        self._connections = connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._short = False
        self._timer: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accepts no more; what has been accepted goes on, unless it is still in its handshake."""
        self._loop.remove_reader(self._listener)
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    async def wait_closed(self) -> None:
        """Until the last handshake has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # it has gone again
        except OSError as error:
            self._pause(error)
            return
        self._short = False
        self._connections.make_room(connection.fileno())
        task = self._loop.create_task(self._open(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _pause(self, error: OSError) -> None:
        """There is no descriptor, or no memory: those who come wait in the kernel's queue."""
        if not self._short:
            logger.warning("cannot accept new connections for now: %s", error.strerror)
        self._short = True
        self._connections.let_idlest_go()
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(_PAUSE_SECONDS, self._listen)

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does for its own servers alone
        handshake = _Handshake(asyncio.current_task())
        self._connections.add(handshake)
        seconds = None if self.context is None else HANDSHAKE_SECONDS
        try:
            with contextlib.suppress(OSError):  # the peer has gone, or speaks no TLS
                await self._loop.connect_accepted_socket(
                    self._protocols, connection, ssl=self.context, ssl_handshake_timeout=seconds
                )
        finally:
            self._connections.discard(handshake)


class _Handshake:
    """A connection that no protocol knows yet."""

    def __init__(self, task: asyncio.Task[None] | None) -> None:
        self._task = task

    def look(self, now: float) -> None:
        """Handshakes end by themselves in their time."""

    def let_go(self) -> bool:
        if self._task is not None:
            self._task.cancel()
        return True
