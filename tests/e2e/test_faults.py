"""The real server when its engine raises, under load: those who are not concerned do not notice, nobody hangs."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import Result, honest, honest_body, status_and_body, streamed, wait_idle
from tests.support.server_process import Server, engine_process, server
from tests.support.waiting import PATIENCE_SECONDS

FAULTY = "tests.support.faulty_server"
CLIENTS = 12
OUT_OF_MEMORY = {"code": "internal_error", "message": "the server is out of memory"}
SAMPLING = {"code": "internal_error", "message": "sampling failed (ValueError)"}
TAKING = {"code": "internal_error", "message": "the engine failed on this request (ValueError)"}
LOST = {"code": "engine_dead", "message": "the engine is gone: the engine failed: RuntimeError: injected"}
NOT_BEGUN = {"code": "engine_dead", "message": "the engine has died"}


@pytest.fixture(scope="module")
def stderr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server says."""
    return tmp_path_factory.mktemp("faulty") / "stderr"


@pytest.fixture(scope="module")
def faulty_server(tiny_bundle: Path, stderr: Path) -> Iterator[Server]:
    flags = ("--model", str(tiny_bundle), "--threads", "1")
    with stderr.open("wb") as log, server(*flags, module=FAULTY, stderr=log) as running:
        yield running


@pytest.fixture(scope="module")
def alone(faulty_server: Server) -> list[list[int]]:
    """What each client is to get."""
    return [asyncio.run(honest(faulty_server.port, number)) for number in range(CLIENTS)]


async def result_of(port: int, number: int, stream: bool, **fields: Any) -> Result | None:
    """What one client gets; None where nobody listens any more."""
    body = json.dumps({**honest_body(number), **fields, "stream": stream}).encode()
    try:
        if stream:
            return await streamed(port, body)
        _, answer = await status_and_body(port, body)
    except (ConnectionError, IndexError):  # closed before an answer began
        return None
    return (answer["outputs"][0]["token_ids"], None) if "outputs" in answer else ([], answer["error"])


def failures(results: list[Result], alone: list[list[int]]) -> list[dict[str, Any]]:
    """The errors. Everybody else must have had what it gets alone, and these a part of it."""
    found = []
    for (tokens, error), expected in zip(results, alone, strict=True):
        if error is None:
            assert tokens == expected
        else:
            assert tokens == expected[: len(tokens)]
            found.append({name: error[name] for name in ("code", "message")})
    return found


async def crowd_while(port: int, meanwhile: Any) -> tuple[list[Result | None], list[int]]:
    """Every client asks again and again, half of them for a stream, until `meanwhile` is over or nobody listens.
    Returns what they got, and who.
    """
    task = asyncio.create_task(meanwhile)
    results: list[Result | None] = []
    who: list[int] = []

    async def client(number: int) -> None:
        while True:
            over = task.done()
            results.append(await result_of(port, number, stream=number % 2 == 0))
            who.append(number)
            if over or results[-1] is None:
                return

    async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(number))
    await task
    return results, who


def test_out_of_memory_under_load_costs_one_request_each_time(faulty_server: Server, alone: list[list[int]]) -> None:
    """Of a step that was too large one goes, the others run their rows again; nothing is held, cached or left over."""
    engine = engine_process(faulty_server)

    async def run_out() -> None:
        for _ in range(5):
            await asyncio.sleep(0.1)
            engine.send_signal(signal.SIGUSR1)
        await asyncio.sleep(0.1)

    results, who = asyncio.run(crowd_while(faulty_server.port, run_out()))
    found = failures([result for result in results if result is not None], [alone[number] for number in who])
    assert 1 <= len(found) <= 5
    assert all(error == OUT_OF_MEMORY for error in found)
    wait_idle(faulty_server)
    assert [asyncio.run(honest(faulty_server.port, number)) for number in range(CLIENTS)] == alone
    assert engine.is_running()


@pytest.mark.parametrize(("salt", "error"), [("sampling", SAMPLING), ("taking", TAKING)])
def test_a_request_that_raises_fails_alone(
    faulty_server: Server, alone: list[list[int]], salt: str, error: dict[str, Any]
) -> None:
    """Three at once fail, two of them streams after three tokens, one of them with all of its choices."""

    async def scene() -> tuple[list[Result], list[Result | None]]:
        async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as group:
            good = [group.create_task(result_of(faulty_server.port, n, n % 2 == 0)) for n in range(CLIENTS)]
            fields: list[dict[str, Any]] = [{"stream": True}, {"stream": True}, {"stream": False, "n": 3}]
            bad = [
                group.create_task(result_of(faulty_server.port, number, cache_salt=salt, **more))
                for number, more in enumerate(fields)
            ]
        return [task.result() or ([], {}) for task in good], [task.result() for task in bad]

    good, bad = asyncio.run(scene())
    assert failures(good, alone) == []
    assert failures([result or ([], {}) for result in bad], alone[:3]) == [error] * 3
    assert [len(result[0]) for result in bad if result is not None] == [3, 3, 0]
    wait_idle(faulty_server)


def test_an_engine_that_is_wrong_for_everybody_ends_the_server(
    faulty_server: Server, alone: list[list[int]], stderr: Path
) -> None:
    """The last test here. Everybody hears why, 500 where the engine had the request and 503 where it had not; the exit
    code is 3.
    """
    engine = engine_process(faulty_server)

    async def fail() -> None:
        await asyncio.sleep(0.2)
        engine.send_signal(signal.SIGUSR2)
        await asyncio.to_thread(faulty_server.process.wait, PATIENCE_SECONDS)

    results, who = asyncio.run(crowd_while(faulty_server.port, fail()))
    assert faulty_server.process.wait(0) == 3
    answered = [(result, alone[number]) for result, number in zip(results, who, strict=True) if result is not None]
    found = failures([result for result, _ in answered], [expected for _, expected in answered])
    assert LOST in found
    assert all(error in (LOST, NOT_BEGUN) for error in found)
    assert "error: the engine is lost: the engine failed: RuntimeError: injected" in stderr.read_text()
