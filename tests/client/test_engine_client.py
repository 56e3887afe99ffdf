"""EngineClient and worker.py across a real process border, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from service.client.engine_client import EngineClient
from service.client.progress import Progress
from service.contract import wire
from service.contract.errors import InternalError, InvalidRequestError, StartupError, TimedOutError, UnavailableError
from service.contract.options import EngineOptions
from service.contract.output import StepStats
from service.contract.request import Request, SamplingParams
from service.contract.steering import Steering
from service.engine.worker import _linger
from tests.api.processes.test_bounded_process import descriptors
from tests.support.fake_engine import HANGING, POISON, UNTAKEN, build_tokenizer, write_bundle
from tests.support.waiting import PATIENCE_SECONDS

FAST, SLOW = "tests.support.fake_engine:load_engine", "tests.support.fake_engine:load_slow_engine"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path)


def request(id: str, max_tokens: int = 8, prompt: list[int] | None = None, n: int = 1) -> Request:
    return Request(id, prompt or [40, 41, 42], SamplingParams(max_tokens=max_tokens, n=n))


def with_engine(
    bundle: Path,
    test: Callable[[EngineClient], Coroutine[None, None, None]],
    loader: str = FAST,
    timeout_seconds: float = 60.0,
) -> list[str]:
    progress: list[str] = []

    async def run() -> None:
        client = EngineClient(loader, timeout_seconds=timeout_seconds)
        try:
            await client.start(EngineOptions(str(bundle)), progress.append)
            async with asyncio.timeout(PATIENCE_SECONDS):
                await test(client)
        finally:
            await client.close()

    asyncio.run(run())
    return progress


async def collect(client: EngineClient, wanted: Request) -> list[int]:
    async with client.submit(wanted) as outputs:
        return [token.id async for output in outputs for token in output.tokens]


def test_a_hash_that_comes_later_is_part_of_the_info(bundle: Path) -> None:
    async def test(client: EngineClient) -> None:
        while client.info.weights_sha256 is None:
            assert client.info.fingerprint == "1" * 64
            await asyncio.sleep(0.01)
        assert client.info.weights_sha256 == "2" * 64
        assert await collect(client, request("r", 3))

    with_engine(bundle, test, "tests.support.fake_engine:load_unidentified_engine")


def test_tokens_arrive_in_order_for_many_requests_at_once(bundle: Path) -> None:
    reply = build_tokenizer().encode("The answer is 42").ids
    steps: list[StepStats] = []

    async def test(client: EngineClient) -> None:
        client.on_step = steps.append
        answers = await asyncio.gather(*(collect(client, request(str(i), 1 + i % 12)) for i in range(60)))
        assert [answer == reply[: 1 + i % 12] for i, answer in enumerate(answers)] == [True] * 60
        assert not client._streams  # nothing is kept of an ended request

    progress = with_engine(bundle, test)
    assert progress[-1] == "reading the fake bundle"
    assert sum(step.real_rows for step in steps) > 0


def test_choices_are_interleaved_and_all_end(bundle: Path) -> None:
    async def test(client: EngineClient) -> None:
        ended = set()
        async with client.submit(request("n", n=4)) as outputs:
            async for output in outputs:
                if output.finish_reason:
                    ended.add(output.index)
        assert ended == {0, 1, 2, 3}

    with_engine(bundle, test)


def test_leaving_early_aborts_and_costs_no_further_step(bundle: Path) -> None:
    load: list[StepStats] = []

    async def test(client: EngineClient) -> None:
        client.on_step = load.append
        async with client.submit(request("gone", max_tokens=10_000)) as outputs:
            await anext(outputs)
        await collect(client, request("next", 1))
        assert load[-1].requests_running == 0

    with_engine(bundle, test, SLOW)


def test_aborting_one_choice_leaves_the_others(bundle: Path) -> None:
    async def test(client: EngineClient) -> None:
        seen: dict[int, int] = {0: 0, 1: 0}
        async with client.submit(request("half", max_tokens=20, n=2)) as outputs:
            async for output in outputs:
                seen[output.index] += len(output.tokens)
                if seen[0] == 3 and output.index == 0:
                    client.abort("half", 0)
        assert seen == {0: 3, 1: 20}

    with_engine(bundle, test)


def test_what_cannot_be_served_never_leaves(bundle: Path) -> None:
    """Nobody behind the client looks at ids, lengths or steering again. One of a call refuses all of it."""
    bad = [
        *(request("id", prompt=[40, id]) for id in (-1, 259, 2**70)),
        request("long", max_tokens=94),
        replace(request("bias"), sampling=SamplingParams(max_tokens=1, logit_bias={-1: 1.0})),
        replace(request("steered"), steering=Steering(only=(3,))),
    ]

    async def test(client: EngineClient) -> None:
        sent: list[object] = []
        assert client._connection is not None
        client._connection.send = sent.append  # type: ignore[method-assign]
        for one in bad:
            with pytest.raises(InvalidRequestError):
                async with client.submit(request("good"), one):
                    raise AssertionError("submitted")
        assert (sent, client._streams) == ([], {})

    with_engine(bundle, test)


def test_requests_leave_in_canonical_form(bundle: Path) -> None:
    async def test(client: EngineClient) -> None:
        sent: list[object] = []
        assert client._connection is not None
        client._connection.send = sent.append  # type: ignore[method-assign]
        wanted = replace(request("a"), steering=Steering(exclude=(1,)))
        async with client.submit(wanted):
            pass
        assert sent == [wire.Submit(replace(wanted, steering=Steering(only=(0, 2)))), wire.Abort("a")]

    with_engine(bundle, test)


def test_what_the_engine_cannot_take_ends_alone(bundle: Path) -> None:
    """Every choice of it hears why; the process and the others go on."""

    async def test(client: EngineClient) -> None:
        other = asyncio.create_task(collect(client, request("other", max_tokens=60)))
        async with client.submit(request("bad", prompt=[UNTAKEN], n=2)) as outputs:
            ends = [(one.index, one.finish_reason, one.error) async for one in outputs]
        assert ends == [(i, "error", "the engine could not take this request (KeyError)") for i in (0, 1)]
        assert len(await other) == 60
        assert len(await collect(client, request("next"))) == 8
        assert client.alive

    with_engine(bundle, test, SLOW)


@pytest.mark.parametrize("how", ["step raises", "killed"])
def test_when_the_engine_dies_everybody_hears_of_it(bundle: Path, how: str) -> None:
    async def test(client: EngineClient) -> None:
        waiting = asyncio.create_task(collect(client, request("waiting", max_tokens=100_000)))
        await asyncio.sleep(0.05)
        if how == "killed":
            assert client._process is not None
            os.kill(client._process.pid, signal.SIGKILL)
        else:
            with pytest.raises(InternalError, match="poisoned"):
                await collect(client, request("bad", prompt=[POISON]))
        with pytest.raises(InternalError):
            await waiting
        assert not client.alive
        with pytest.raises(UnavailableError):
            await collect(client, request("late"))

    with_engine(bundle, test, SLOW)


def test_several_requests_are_one_stream(bundle: Path) -> None:
    reply = build_tokenizer().encode("The answer is 42").ids

    async def test(client: EngineClient) -> None:
        tokens: dict[tuple[str, int], list[int]] = {}
        async with client.submit(request("a", 3, n=2), request("b", 5)) as outputs:
            async for output in outputs:
                choice = tokens.setdefault((output.request_id, output.index), [])
                choice += [token.id for token in output.tokens]
        assert tokens == {("a", 0): reply[:3], ("a", 1): reply[1:4], ("b", 0): reply[:5]}

    with_engine(bundle, test)


def test_at_the_deadline_the_reader_hears_and_the_engine_forgets(bundle: Path) -> None:
    async def test(client: EngineClient) -> None:
        load: list[StepStats] = []
        client.on_step = load.append
        now, seen = asyncio.get_running_loop().time(), []

        async def read() -> None:
            async with client.submit(request("slow", 100_000), deadline=now + 0.2) as outputs:
                async for output in outputs:
                    seen.append(output)

        with pytest.raises(TimedOutError):
            await read()
        assert 5 < len(seen) < 10_000, "500 s of steps"
        await collect(client, request("next", 1))
        assert load[-1].requests_running == 0

    with_engine(bundle, test, SLOW)


def test_an_engine_that_hangs_is_lost_and_ended(bundle: Path) -> None:
    """A step that never returns must not leave callers waiting for ever, nor the process with the model in memory."""
    lost: list[str] = []

    async def test(client: EngineClient) -> None:
        client.on_lost = lost.append
        await asyncio.sleep(1.2)
        assert client.alive  # an idle engine answers
        with pytest.raises(InternalError, match=r"has not answered for 0\.5 s"):
            await collect(client, request("hang", prompt=[HANGING]))
        assert not client.alive
        assert lost == ["the engine has not answered for 0.5 s (--engine-timeout)"]
        assert client._process is not None
        assert await asyncio.to_thread(client._process.wait, 5) == -signal.SIGKILL

    with_engine(bundle, test, timeout_seconds=0.5)


def test_a_stopped_engine_is_stalled_until_it_goes_on(bundle: Path) -> None:
    """With work and without; what it owes comes when it goes on."""

    async def until(client: EngineClient, stalled: bool) -> None:
        while client.stalled is not stalled:
            await asyncio.sleep(0.01)

    async def test(client: EngineClient) -> None:
        client._progress = Progress(0.3)
        assert client._process is not None
        for has_work in (True, False):
            asking = asyncio.create_task(collect(client, request("a", max_tokens=60))) if has_work else None
            await asyncio.sleep(0.05)
            client._process.send_signal(signal.SIGSTOP)
            await until(client, True)
            assert client.alive
            client._process.send_signal(signal.SIGCONT)
            await until(client, False)
            assert asking is None or len(await asking) == 60

    with_engine(bundle, test, SLOW)


def test_loading_failures_carry_message_and_hint(tmp_path: Path) -> None:
    async def test(client: EngineClient) -> None:
        raise AssertionError("it should not have started")

    with pytest.raises(StartupError, match=r"tokenizer\.json is missing") as caught:
        with_engine(tmp_path / "absent", test)
    assert caught.value.hint == "write_bundle() makes it"
    with pytest.raises(StartupError, match="No module named"):
        with_engine(tmp_path, test, "tests.no_such_module:load")
    with pytest.raises(StartupError, match="SIGKILL, perhaps for want of memory"):
        with_engine(tmp_path, test, "tests.support.fake_engine:load_killed_engine")


def test_closing_while_loading_does_not_hang(bundle: Path) -> None:
    async def run() -> None:
        client = EngineClient("time:sleep")  # never mind what it does: it is not an engine
        starting = asyncio.create_task(client.start(EngineOptions(str(bundle)), lambda _: None))
        await asyncio.sleep(0.02)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await client.close()
        with pytest.raises(StartupError):
            await starting

    asyncio.run(run())


def test_frames_survive_any_cutting() -> None:
    encoder, reader = wire.FrameEncoder(), wire.FrameReader()
    messages = [wire.Abort("a" * size, size) for size in (0, 1, 300, 70_000)]
    data = b"".join(encoder.encode(message) for message in messages)
    for size in (1, 3, 7, 4096, len(data)):
        frames = [frame for start in range(0, len(data), size) for frame in reader.feed(data[start : start + size])]
        assert [wire.msgspec.msgpack.decode(frame, type=wire.ToEngine) for frame in frames] == messages


def test_the_client_needs_no_torch() -> None:
    code = "import sys, service.client.engine_client; sys.exit(any(name in sys.modules for name in sys.argv[1:]))"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, "torch", "service.engine.loader"]) == 0


def test_every_field_of_a_request_crosses() -> None:
    """A field that one side does not know would be lost without a word."""
    sent = Request(
        "id", [1, 2], SamplingParams(max_tokens=128, seed=2**63 - 1), "full", 1, cache_salt="salt", freeze_after=3
    )
    [frame] = wire.FrameReader().feed(wire.FrameEncoder().encode(wire.Submit(sent)))
    assert msgspec.msgpack.Decoder(wire.ToEngine).decode(frame) == wire.Submit(sent)


def test_the_last_message_of_a_worker_with_many_descriptors() -> None:
    """It waits for its reader where `select.select` would raise: its socket's number is over 1,023."""
    ours, theirs = socket.socketpair()
    with ours, theirs, descriptors(2000), ThreadPoolExecutor(1) as thread:
        high = fcntl.fcntl(theirs, fcntl.F_DUPFD, 1100)
        with socket.socket(fileno=high) as connection:
            connection.sendall(b"the last")
            lingering = thread.submit(_linger, connection)
            assert ours.recv(100) == b"the last"
            ours.close()
            assert lingering.result(30) is None
