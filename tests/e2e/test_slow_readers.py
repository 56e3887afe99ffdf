"""Clients that take nothing of their answers, and connections that ask nothing: all others are served as ever."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.clients import honest_body, send, wait_idle
from tests.support.server_process import Server, server
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow  # a minute of waiting for times that pass

SEATS, WAITING = 16, 4
DEADLINE_SECONDS = 2
DESCRIPTORS = 64
KEY = "the-only-key-there-is"


def never_reads(port: int, body: dict[str, Any]) -> socket.socket:
    """A request whose answer stays in the server: small segments and a small window leave the kernels little of it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.connect(("127.0.0.1", port))
    payload = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    connection.sendall(f"{head}\r\n".encode() + payload)
    return connection


def large(n: int, **fields: Any) -> dict[str, Any]:
    """Megabytes of answer."""
    wishes = {"ignore_eos": True, "stream": True, "logprobs": 20, "return_scalings": "full"}
    return {"prompt": [5, 6, 7], "max_tokens": 900, "n": n} | wishes | fields


@contextmanager
def never_reading(running: Server, count: int, body: dict[str, Any]) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(never_reads(running.port, body)) for _ in range(count)]


def connections(running: Server) -> int:
    """Those that clients have to the server, of this moment."""
    found = psutil.Process(running.process.pid).net_connections("tcp")
    return sum(one.status != psutil.CONN_LISTEN for one in found if one.laddr.port == running.port)


def ask(running: Server) -> int:
    return running.post("/generate", {"prompt": [5, 6, 7], "max_tokens": 1, "n": 2})[0]


def all_is_given_back(running: Server) -> None:
    """Seats, blocks, counters and sockets; and the engine does nothing more."""
    assert ask(running) == 200
    wait_idle(running)
    assert wait_for(lambda: connections(running) == 0, 10)
    rows = running.metric('xlora_rows_total{stream="real"}')
    time.sleep(0.5)
    assert running.metric('xlora_rows_total{stream="real"}') == rows


@pytest.fixture(scope="module")
def seats_server(tiny_bundle: Path) -> Iterator[Server]:
    """Short times; a stream that ends early may fit the kernels' buffers, and its connection is idle then."""
    flags = ("--max-num-seqs", str(SEATS), "--max-queued-requests", str(WAITING))
    flags += ("--write-timeout", "2", "--keep-alive", "3")
    with server("--model", str(tiny_bundle), "--threads", "1", *flags) as running:
        yield running


@pytest.mark.parametrize("n", [1, 16])
def test_readers_that_never_read_hold_nothing_after_their_deadline(seats_server: Server, n: int) -> None:
    """They hold every seat and place until then, and no longer, although their sockets stay open."""
    count = (SEATS + WAITING) // n + (n > 1)
    with never_reading(seats_server, count, large(n, timeout=DEADLINE_SECONDS)):
        began = time.monotonic()
        assert wait_for(lambda: ask(seats_server) == 429, DEADLINE_SECONDS)
        assert wait_for(lambda: seats_server.metric("xlora_kv_blocks_used_ratio") > 0, DEADLINE_SECONDS)
        assert wait_for(lambda: ask(seats_server) == 200, DEADLINE_SECONDS + 2)
        assert time.monotonic() - began > DEADLINE_SECONDS / 2
        all_is_given_back(seats_server)


@pytest.mark.parametrize("n", [1, 16])
def test_readers_that_never_read_are_gone_without_a_deadline(seats_server: Server, n: int) -> None:
    """The server's own --write-timeout of 2 s; the requests' deadline is ten minutes away."""
    with never_reading(seats_server, (SEATS + WAITING) // n + (n > 1), large(n)):
        assert wait_for(lambda: ask(seats_server) == 429, 2)
        assert wait_for(lambda: ask(seats_server) == 200, 20)
        assert wait_for(lambda: connections(seats_server) == 0, 20)
        all_is_given_back(seats_server)


def test_whole_documents_that_nobody_takes_are_gone(seats_server: Server) -> None:
    """Their seats were free before; their memory and their sockets are now."""
    with never_reading(seats_server, 4, large(4, stream=False, max_tokens=200)):
        assert wait_for(lambda: connections(seats_server) == 4, 5)
        assert wait_for(lambda: connections(seats_server) == 0, 30)
        all_is_given_back(seats_server)


@pytest.fixture(scope="module")
def narrow_server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """64 descriptors, and a key that strangers do not have; and its log."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    log = tmp_path_factory.mktemp("narrow") / "log"
    with log.open("wb") as stderr:
        flags = ("--model", str(tiny_bundle), "--threads", "1")
        with server(*flags, env={"XLORA_API_KEYS": KEY}, stderr=stderr, preexec_fn=limit) as running:
            yield running, log


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n\n"])
def test_idle_connections_leave_room_for_who_asks(narrow_server: tuple[Server, Path], start: bytes) -> None:
    """Two hundred at 64 descriptors: silent, with half a head, or after an answer. A stream goes on beside them."""
    running, log = narrow_server

    async def scene() -> tuple[list[int], int, int]:
        stream = {"prompt": [5, 6, 7], "max_tokens": 300, "stream": True, "ignore_eos": True, "seed": 1}
        reader, writer = await send(running.port, json.dumps(stream).encode(), KEY)
        assert b" 200 " in await reader.readline()
        strangers, statuses = [], []
        for number in range(200):
            strangers.append(await asyncio.open_connection("127.0.0.1", running.port))
            strangers[-1][1].write(start)
            if number % 40 == 39:
                statuses += [await status(running.port) for _ in range(3)]
        events = (await reader.read()).count(b"data: {")
        alive = psutil.Process(running.process.pid).num_fds()
        for _, other in (*strangers, (reader, writer)):
            other.transport.abort()
        return statuses, events, alive

    async def status(port: int) -> int:
        reader, writer = await send(port, json.dumps(honest_body(1)).encode(), KEY)
        found = int((await reader.readline()).split()[1])
        writer.close()
        return found

    statuses, events, descriptors = asyncio.run(scene())
    assert statuses == [200] * 15
    assert events == 301  # one for each token, and the last
    assert descriptors <= DESCRIPTORS
    assert b"Traceback" not in log.read_bytes()
