"""Many clients at once, most of them rude: every honest request gets the tokens it would have got alone."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.support.clients import honest, honest_body, send, status_and_body, wait_idle
from tests.support.server_process import Server, server
from tests.support.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.slow

GARBAGE = [
    b"{",
    b"\xff\xfe\x00",
    b'{"prompt": []}',
    b'{"prompt": [999999]}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "max_tokens": 1e99}',
    b'{"prompt": "x", "no_such_field": 1}',
    b'{"prompt": "x", "n": "two"}',
    b'{"prompt": {"a": 1}}',
    b"[" * 50_000,
    b'{"prompt": "x", "max_tokens": 100000}',
]


async def honest_or_refused(port: int, number: int) -> int | list[int]:
    """The tokens, or the status with which the server said no; 0 when nobody listens any more."""
    try:
        status, answer = await status_and_body(port, json.dumps(honest_body(number)).encode())
    except (ConnectionError, IndexError):  # closed before an answer began
        return 0
    if status != 200:
        assert set(answer["error"]) >= {"message", "type", "param", "code"}
        return status
    tokens: list[int] = answer["outputs"][0]["token_ids"]
    return tokens


async def leaves_mid_stream(port: int, number: int) -> None:
    body = {"prompt": [5 + number, 6, 7], "max_tokens": 900, "stream": True, "ignore_eos": True}
    reader, writer = await send(port, json.dumps(body).encode())
    for _ in range(number % 7):
        await reader.readline()
    writer.transport.abort()


async def sends_garbage(port: int, number: int) -> None:
    status, answer = await status_and_body(port, GARBAGE[number % len(GARBAGE)])
    assert status == 400, answer
    assert set(answer["error"]) >= {"message", "type", "param", "code"}


async def crowd(port: int) -> list[list[int]]:
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number in range(22):
            tasks.append(group.create_task(honest(port, number)))
            group.create_task(leaves_mid_stream(port, number))
            group.create_task(sends_garbage(port, number))
    return [task.result() for task in tasks]


def test_honest_requests_get_their_own_tokens_amid_rude_clients(tiny_server: Server) -> None:
    """A disconnect or a bad body must not touch a neighbour; 66 clients, a third of each kind."""
    alone = [asyncio.run(honest(tiny_server.port, number)) for number in range(22)]
    assert asyncio.run(crowd(tiny_server.port)) == alone
    wait_idle(tiny_server)


def test_client_that_goes_away_stops_costing_compute(tiny_server: Server) -> None:
    """The engine is idle before its 900 tokens are made."""
    generated = tiny_server.metric("xlora_generated_tokens_total")
    asyncio.run(leaves_mid_stream(tiny_server.port, 3))
    wait_idle(tiny_server)
    assert tiny_server.metric("xlora_generated_tokens_total") - generated < 900


def test_hundred_megabytes_are_refused_and_the_others_go_on(tiny_server: Server) -> None:
    """The body is refused while it streams in, not after it has been collected."""

    async def scene() -> tuple[int, list[int]]:
        neighbour = asyncio.create_task(honest(tiny_server.port, 1))
        reader, writer = await asyncio.open_connection("127.0.0.1", tiny_server.port)
        writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        try:
            for _ in range(100):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass  # it stopped listening: its answer may still be readable
        status = int((await reader.readline()).split()[1])
        writer.close()
        return status, await neighbour

    status, tokens = asyncio.run(scene())
    assert status == 413
    assert len(tokens) == honest_body(1)["max_tokens"]


@pytest.fixture(scope="module")
def small_server(tiny_bundle: Path) -> Iterator[Server]:
    """A queue that 200 clients are too many for."""
    flags = ("--max-num-seqs", "8", "--max-queued-requests", "16", "--max-header-bytes", "4096")
    flags += ("--drain-seconds", "15")
    with server("--model", str(tiny_bundle), "--threads", "1", *flags) as running:
        yield running


def resident_bytes(running: Server) -> int:
    """Memory of the API's process and the engine's."""
    process = psutil.Process(running.process.pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def test_two_hundred_at_once_get_their_tokens_or_a_refusal(small_server: Server) -> None:
    """Over the limit is 429; whoever is admitted gets what it would have got alone; memory does not stay behind."""

    async def wave() -> list[int | list[int]]:
        return await asyncio.gather(*(honest_or_refused(small_server.port, number % 10) for number in range(200)))

    alone = [asyncio.run(honest(small_server.port, number)) for number in range(10)]
    asyncio.run(wave())  # the allocators have seen a wave
    before = resident_bytes(small_server)
    for _ in range(2):
        answers = asyncio.run(wave())
        refused = [answer for answer in answers if isinstance(answer, int)]
        assert set(refused) == {429}
        served = [(answer, alone[number % 10]) for number, answer in enumerate(answers) if answer != 429]
        assert len(served) >= 16
        assert all(ours == theirs for ours, theirs in served)
        wait_idle(small_server)
    assert resident_bytes(small_server) - before < 24 << 20


def test_those_who_say_or_read_nothing_hold_nobody_up(small_server: Server) -> None:
    """Half a head, half a body, a silent connection, a reader that does not read: the others do not notice."""
    port = small_server.port
    alone = [asyncio.run(honest(port, number)) for number in range(6)]
    stream = json.dumps({"prompt": [5, 6, 7], "max_tokens": 900, "stream": True, "ignore_eos": True, "logprobs": 20})
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(stream)}\r\n\r\n"
    )
    with ExitStack() as stack:
        for start in ["", "POST /gen", head, head + stream[:20], head + stream] * 4:
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            connection.sendall(start.encode())

        async def others() -> list[list[int]]:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await asyncio.gather(*(honest(port, number) for number in range(6)))

        assert asyncio.run(others()) == alone
    wait_idle(small_server)


def test_sigterm_under_load_answers_everybody(small_server: Server) -> None:
    """The last test here. Every request ends with its tokens, a refusal, or finds nobody listening; none hangs; the
    exit code is 0.
    """

    async def scene(running: Server) -> list[int | list[int]]:
        tasks = []
        for number in range(60):
            tasks.append(asyncio.create_task(honest_or_refused(running.port, number % 10)))
            await asyncio.sleep(0.01)
            if number == 20:
                running.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await asyncio.gather(*tasks)

    alone = [asyncio.run(honest(small_server.port, number)) for number in range(10)]
    answers = asyncio.run(scene(small_server))
    assert small_server.process.wait(PATIENCE_SECONDS) == 0
    kinds = Counter(answer if isinstance(answer, int) else 200 for answer in answers)
    assert set(kinds) <= {200, 429, 503, 0}, kinds
    served = [(answer, alone[number % 10]) for number, answer in enumerate(answers) if isinstance(answer, list)]
    assert all(ours == theirs for ours, theirs in served)
    assert 0 < len(served) < 60, kinds
