"""Accepting with few descriptors: who comes waits, or the idlest makes room; handshakes too can be let go."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from service.api.connections.acceptor import Acceptor
from service.api.connections.open_connections import OpenConnections
from tests.support.waiting import PATIENCE_SECONDS, wait_for

LOOPS = pytest.mark.parametrize("loops", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])


class Listener(socket.socket):
    """Has no descriptor for a newcomer while it is short."""

    short = False

    def accept(self) -> tuple[socket.socket, object]:
        if self.short:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


class Greeting(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:
        nodelay = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.write(b"at once" if nodelay else b"late")
        transport.close()


def run(loops: Callable[[], asyncio.AbstractEventLoop], scene: Callable[[], object]) -> None:
    with asyncio.Runner(loop_factory=loops) as runner:
        runner.run(scene())  # type: ignore[arg-type]


def said_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "xlora"]


@asynccontextmanager
async def accepting(listener: Listener, *given: Any) -> AsyncIterator[tuple[str, int]]:
    with listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        acceptor = Acceptor(listener, Greeting, *given)
        try:
            yield listener.getsockname()
        finally:
            acceptor.close()
            await acceptor.wait_closed()


@LOOPS
def test_without_a_descriptor_newcomers_wait(
    loops: Callable[[], asyncio.AbstractEventLoop], caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log, however long it lasts; then they are served."""

    async def scene() -> None:
        listener = Listener()
        listener.short = True
        async with accepting(listener, None, OpenConnections()) as address:
            reader, writer = await asyncio.open_connection(*address)
            assert await asyncio.to_thread(wait_for, lambda: said_of(caplog))
            await asyncio.sleep(0.3)
            assert said_of(caplog) == ["cannot accept new connections for now: Too many open files"]
            listener.short = False
            assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b"at once"
            writer.close()

    run(loops, scene)


@LOOPS
def test_handshakes_that_never_end_make_room(loops: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Under TLS a connection is one only after its handshake; until then it takes a descriptor as well."""

    async def scene() -> None:
        connections = OpenConnections(max_descriptors=0)  # every newcomer is one too many
        async with accepting(Listener(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), connections) as address:
            first, first_writer = await asyncio.open_connection(*address)
            await asyncio.sleep(0.2)
            assert not first.at_eof()
            second, second_writer = await asyncio.open_connection(*address)
            assert await asyncio.wait_for(first.read(), PATIENCE_SECONDS) == b""
            assert not second.at_eof()
        assert await asyncio.wait_for(second.read(), PATIENCE_SECONDS) == b""
        first_writer.close()
        second_writer.close()

    run(loops, scene)
