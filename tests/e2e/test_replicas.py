"""Several replicas behind the proxy of docker/haproxy: what is retried, what is not, and what a lost replica costs.

The rules about single requests are tested with replicas made of a few lines, which do exactly what a rule is about;
what happens under load, with real servers.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.support.clients import wait_idle
from tests.support.proxy import MISSING, drain_delay, installed, proxy
from tests.support.server_process import Server, free_port, server
from tests.support.waiting import PATIENCE_SECONDS, wait_for

pytestmark = pytest.mark.skipif(not installed(), reason=MISSING)

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def request(
    port: int, body: bytes = b'{"prompt": "a"}', path: str = "/generate"
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one POST; status 0 when the connection ends without an answer."""
    reader, writer = await open_request(port, body, path)
    answer = await reader.read()
    writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]) if lines[0] else 0, headers, rest


async def open_request(
    port: int, body: bytes, path: str = "/generate"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


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
                reader, writer = await open_request(port, b'{"stream": true}')
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


class Fleet:
    """Servers that tests may end."""

    def __init__(self, stack: ExitStack, flags: tuple[str, ...]) -> None:
        self._stack, self._flags = stack, flags
        self._servers: list[Server] = []

    def two(self) -> list[Server]:
        """Two that run: those that have ended are replaced."""
        self._servers = [one for one in self._servers if one.process.poll() is None]
        while len(self._servers) < 2:
            self._servers.append(self._stack.enter_context(server(*self._flags)))
        return list(self._servers)

    def kill(self) -> None:
        """Nobody waits for their drain."""
        for one in self._servers:
            one.process.kill()


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Path) -> Iterator[Fleet]:
    flags = ("--model", str(tiny_bundle), "--threads", "1", "--max-num-seqs", "8")
    flags += ("--drain-delay", str(drain_delay()), "--drain-seconds", "30")
    with ExitStack() as stack:
        fleet = Fleet(stack, flags)
        yield fleet
        fleet.kill()


@pytest.fixture
def replicas(fleet: Fleet) -> list[Server]:
    return fleet.two()


def prompts(count: int, max_tokens: int) -> list[bytes]:
    return [
        json.dumps(
            {"prompt": [2 + number, 5] * 40, "max_tokens": max_tokens, "ignore_eos": True, "stream": True, "seed": 1}
        ).encode()
        for number in range(count)
    ]


def answered(replica: Server) -> float:
    """Calls of /generate that it has answered to their end."""
    name = 'xlora_requests_total{endpoint="/generate",outcome="ok"}'
    return replica.metric(name) if name in replica.get("/metrics")[1].decode() else 0.0


async def is_complete(reader: asyncio.StreamReader) -> bool:
    """Reads a stream to its end, if it comes to one."""
    try:
        rest = await reader.read()
    except ConnectionError:
        return False
    return rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def begin(port: int, sent: list[bytes]) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Streams that have all had their first event."""
    streams = [await open_request(port, body) for body in sent]
    for reader, _ in streams:
        await reader.readuntil(b"data: ")
    return streams


async def finish(streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> int:
    """How many of them come to their end."""
    complete = await asyncio.gather(*(is_complete(reader) for reader, _ in streams))
    for _, writer in streams:
        writer.close()
    return sum(complete)


def test_a_client_that_leaves_stops_costing_compute(replicas: list[Server], tmp_path: Path) -> None:
    """Before the first byte and in the middle of a stream."""

    async def scene(port: int) -> None:
        silent = json.loads(prompts(1, 900)[0]) | {"stream": False}
        leaving = [await open_request(port, json.dumps(silent).encode()), *await begin(port, prompts(2, 900))]
        assert wait_for(lambda: sum(one.metric("xlora_requests_running") for one in replicas) == 3)
        for _, writer in leaving:
            writer.transport.abort()

    def generated() -> float:
        return sum(one.metric("xlora_generated_tokens_total") for one in replicas)

    before = generated()
    with proxy([one.port for one in replicas], tmp_path) as port:
        asyncio.run(scene(port))
        for one in replicas:
            wait_idle(one)
    assert generated() - before < 3 * 900


def test_a_killed_replica_costs_its_own_streams_only(replicas: list[Server], tmp_path: Path) -> None:
    """12 streams run when one of two replicas is killed; its own end, the others and all new ones complete."""

    async def scene(port: int) -> tuple[int, int, Counter[int]]:
        streams = await begin(port, prompts(12, 400))
        doomed = round(replicas[0].metric("xlora_requests_running"))
        replicas[0].process.kill()
        new = [json.loads(body) | {"stream": False, "max_tokens": 5} for body in prompts(30, 0)]
        statuses = Counter([(await request(port, json.dumps(body).encode()))[0] for body in new])
        return doomed, await finish(streams), statuses

    before = answered(replicas[1])
    with proxy([one.port for one in replicas], tmp_path) as port:
        doomed, complete, statuses = asyncio.run(scene(port))
        assert 0 < doomed < 12
        assert complete == 12 - doomed
        assert statuses == {200: 30}
        wait_idle(replicas[1])
    assert answered(replicas[1]) - before == complete + 30


def test_a_replica_is_replaced_without_a_lost_request(replicas: list[Server], tmp_path: Path) -> None:
    """SIGTERM under traffic, as an upgrade sends it: its streams complete, new requests go elsewhere, it exits with 0.

    The traffic begins before the signal and goes on until the process has ended: no moment between costs a request.
    """

    async def scene(port: int) -> tuple[int, Counter[int]]:
        streams = await begin(port, prompts(8, 300))
        assert replicas[0].metric("xlora_requests_running") > 0
        traffic = [asyncio.create_task(send_until_ended(port, body)) for body in prompts(4, 0)]
        await asyncio.sleep(0.3)
        replicas[0].process.send_signal(signal.SIGTERM)
        complete = await finish(streams)
        return complete, sum(await asyncio.gather(*traffic), Counter())

    async def send_until_ended(port: int, body: bytes) -> Counter[int]:
        short = json.dumps(json.loads(body) | {"stream": False, "max_tokens": 5}).encode()
        statuses = Counter[int]()
        while replicas[0].process.poll() is None:
            statuses[(await request(port, short))[0]] += 1
        return statuses

    with proxy([one.port for one in replicas], tmp_path) as port:
        complete, statuses = asyncio.run(asyncio.wait_for(scene(port), PATIENCE_SECONDS))
    assert complete == 8
    assert set(statuses) == {200}
    assert replicas[0].process.wait(PATIENCE_SECONDS) == 0
