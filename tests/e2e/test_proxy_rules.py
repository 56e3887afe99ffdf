"""The rules of docker/haproxy about single requests: what is retried at another replica, what is not, what passes.

The replicas are made of a few lines, and do exactly what a rule is about. Real servers: test_replicas.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.clients import send
from tests.support.proxy import MISSING, installed, proxy
from tests.support.server_process import free_port
from tests.support.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.skipif(not installed(), reason=MISSING)

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def request(
    port: int, body: bytes = b'{"prompt": "a"}', path: str = "/generate"
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one POST; status 0 when the connection ends without an answer."""
    reader, writer = await send(port, body, path=path)
    answer = await reader.read()
    writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]) if lines[0] else 0, headers, rest


class Replica:
    """A server that is ready, counts its POSTs and answers them as `answer` does."""

    def __init__(self, answer: Handler) -> None:
        self.answer = answer
        self.port = free_port()
        self.posts = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /readyz"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            self.posts += 1
            length = next(line for line in head.lower().split("\r\n") if line.startswith("content-length"))
            await reader.readexactly(int(length.split(":")[1]))
            await self.answer(reader, writer)
        writer.close()


@asynccontextmanager
async def running(*replicas: Replica) -> AsyncIterator[None]:
    servers = [await asyncio.start_server(one.serve, "127.0.0.1", one.port) for one in replicas]
    try:
        yield
    finally:
        for one in servers:
            one.close()


def answers(status: int) -> Handler:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())

    return answer


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def bodies(count: int) -> list[bytes]:
    """Different from the first byte of their prompt on, so that they spread over the replicas."""
    return [json.dumps({"prompt": f"{number} " * 20}).encode() for number in range(count)]


def ask_all(tmp_path: Path, replicas: list[Replica], sent: list[bytes], alive: int = 2) -> list[tuple[int, bytes]]:
    """Status and body of every request, sent one after another through the proxy; the first `alive` replicas run."""

    async def scene() -> list[tuple[int, bytes]]:
        async with running(*replicas[:alive]):
            with proxy([one.port for one in replicas], tmp_path) as port:
                found = [await request(port, body) for body in sent]
        return [(status, body) for status, _, body in found]

    return asyncio.run(scene())


def test_requests_that_begin_alike_go_to_one_replica_and_others_spread(tmp_path: Path) -> None:
    replicas = [Replica(answers(200)), Replica(answers(200))]
    prompt = "You are a patient teacher of arithmetic. " * 8
    alike = [json.dumps({"prompt": f"{prompt} {number}"}).encode() for number in range(10)]
    assert {status for status, _ in ask_all(tmp_path, replicas, alike)} == {200}
    assert sorted(one.posts for one in replicas) == [0, 10]
    ask_all(tmp_path, replicas, bodies(30))
    assert min(one.posts for one in replicas) >= 5


def test_a_refusal_goes_to_another_replica(tmp_path: Path) -> None:
    """503 is the service's word for `nothing was begun`: a replica that drains costs nobody a request."""
    replicas = [Replica(answers(503)), Replica(answers(200))]
    assert {status for status, _ in ask_all(tmp_path, replicas, bodies(20))} == {200}
    assert replicas[0].posts > 0
    assert replicas[1].posts == 20


def test_what_was_never_sent_goes_to_another_replica(tmp_path: Path) -> None:
    """The second replica is not there at all, and the proxy has not yet had the time to find out."""
    replicas = [Replica(answers(200)), Replica(answers(200))]
    assert {status for status, _ in ask_all(tmp_path, replicas, bodies(20), alive=1)} == {200}
    assert replicas[0].posts == 20


@pytest.mark.parametrize(("handler", "status"), [(hangs_up, 502), (answers(500), 500), (answers(429), 429)])
def test_a_post_that_reached_an_engine_is_never_sent_again(tmp_path: Path, handler: Handler, status: int) -> None:
    replicas = [Replica(handler), Replica(handler)]
    found = ask_all(tmp_path, replicas, bodies(10))
    assert {one for one, _ in found} == {status}
    assert sum(one.posts for one in replicas) == 10
    if status == 502:
        assert json.loads(found[0][1])["error"]["code"] == "replica_lost"


def test_a_large_request_passes_whole(tmp_path: Path) -> None:
    """Larger than what the proxy keeps: it is passed on while it comes in, and its refusal is the caller's."""
    large = json.dumps({"prompt": "x" * 1_000_000}).encode()
    assert ask_all(tmp_path, [Replica(answers(200))], [large], alive=1)[0][0] == 200
    assert ask_all(tmp_path, [Replica(answers(503))], [large], alive=1)[0][0] == 503


def test_events_pass_as_they_come(tmp_path: Path) -> None:
    """The replica sends its second event only after the client has the first: a proxy that collects would hang."""
    seen = asyncio.Event()

    async def streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"9\r\ndata: 1\n\n\r\n")
        await writer.drain()
        await seen.wait()
        writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")
        await writer.drain()

    async def scene() -> bytes:
        replica = Replica(streams)
        async with running(replica), asyncio.timeout(PATIENCE_SECONDS):
            with proxy([replica.port], tmp_path) as port:
                reader, writer = await send(port, b'{"stream": true}')
                await reader.readuntil(b"data: 1")
                seen.set()
                rest = await reader.read()
                writer.close()
        return rest

    assert b"data: 2" in asyncio.run(scene())


def test_without_a_replica_the_answer_is_ours(tmp_path: Path) -> None:
    async def scene() -> tuple[int, dict[str, str], bytes]:
        with proxy([free_port()], tmp_path) as port:
            return await request(port)

    status, headers, body = asyncio.run(scene())
    assert (status, headers["retry-after"], headers["content-type"]) == (503, "5", "application/json")
    assert json.loads(body)["error"]["code"] == "unavailable"
