"""Replicas behind the proxy of docker/haproxy under load: what a client that leaves, a lost one, a replaced one cost.

The rules about single requests: test_proxy_rules.py.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.clients import Streams, send, status_and_body, wait_idle
from tests.support.proxy import MISSING, drain_delay, installed, proxy
from tests.support.server_process import Server, server
from tests.support.waiting import PATIENCE_SECONDS, wait_for

pytestmark = pytest.mark.skipif(not installed(), reason=MISSING)


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


async def begin(port: int, sent: list[bytes]) -> list[Streams]:
    """Streams that have all had their first event."""
    streams = [await send(port, body) for body in sent]
    for reader, _ in streams:
        await reader.readuntil(b"data: ")
    return streams


async def finish(streams: list[Streams]) -> int:
    """How many of them come to their end."""
    complete = await asyncio.gather(*(is_complete(reader) for reader, _ in streams))
    for _, writer in streams:
        writer.close()
    return sum(complete)


def test_a_client_that_leaves_stops_costing_compute(replicas: list[Server], tmp_path: Path) -> None:
    """Before the first byte and in the middle of a stream."""

    async def scene(port: int) -> None:
        silent = json.loads(prompts(1, 900)[0]) | {"stream": False}
        leaving = [await send(port, json.dumps(silent).encode()), *await begin(port, prompts(2, 900))]
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
        statuses = Counter([(await status_and_body(port, json.dumps(body).encode()))[0] for body in new])
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
            statuses[(await status_and_body(port, short))[0]] += 1
        return statuses

    with proxy([one.port for one in replicas], tmp_path) as port:
        complete, statuses = asyncio.run(asyncio.wait_for(scene(port), PATIENCE_SECONDS))
    assert complete == 8
    assert set(statuses) == {200}
    assert replicas[0].process.wait(PATIENCE_SECONDS) == 0
