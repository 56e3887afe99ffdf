"""A child that answers, is slow, dies, says nonsense, cannot be started, is closed: what its callers hear of it."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import psutil
import pytest
import uvloop

from service.api.processes.bounded_process import BoundedProcess, Bounds, ChildDiedError, TookTooLongError
from service.contract.errors import OverloadedError, UnavailableError
from tests.support.waiting import PATIENCE_SECONDS

CHILD = """
import os, signal, sys, time
import service.api.processes.child_loop as loop

OUTPUT = None  # the descriptor that answers go to
say = loop._say

def remember(output, line):
    global OUTPUT
    OUTPUT = output.fileno()
    say(output, line)

def answer(line):
    exec(eval(line))
    return b'{"text": "' + line.strip()[1:-1] + b'"}'

loop._say = remember
loop._ORPHAN_SECONDS = 1 if "orphan" in sys.argv else 300
loop.limit_process(1 << 30)
loop.answer_lines(answer)
"""
COMMAND = [sys.executable, "-c", CHILD]
SLOW = "time.sleep(60)"
Process = BoundedProcess["Echo"]


class Echo(msgspec.Struct):
    text: str


def process(command: list[str] = COMMAND, **bounds: Any) -> Process:
    usual = Bounds(answer_seconds=30.0, wait_seconds=30.0, max_asking=4, max_answer_bytes=10_000)
    return BoundedProcess(command, "the child", "prompt", Echo, replace(usual, **bounds))


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Process, Callable[[Process], Coroutine[Any, Any, None]]], None]:
    """Runs a test in a loop of either kind, and sees that no child is left."""

    def in_loop(asked: Process, test: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
        async def closing() -> None:
            try:
                await test(asked)
            finally:
                asked.close()

        request.param(closing())
        left = [child for child in psutil.Process().children() if "child_loop" in " ".join(child.cmdline())]
        assert psutil.wait_procs(left, timeout=PATIENCE_SECONDS)[1] == []

    return in_loop


def pid_of(asked: Process) -> int:
    assert asked._child is not None
    return asked._child._process.pid


async def answers(asked: Process, text: str) -> None:
    assert await asked.ask(text) == Echo(text)


def test_answers_come_from_one_child(run: Any) -> None:
    async def test(asked: Process) -> None:
        asked.start()
        await answers(asked, "1")
        first = pid_of(asked)
        await asyncio.gather(*(answers(asked, f"{number}") for number in range(4)))
        await answers(asked, "0 # " + "é" * 1000)
        assert pid_of(asked) == first

    run(process(), test)


def test_a_slow_one_is_killed_and_replaced(run: Any) -> None:
    async def test(asked: Process) -> None:
        await answers(asked, "1")
        slow = pid_of(asked)
        asked.bounds = replace(asked.bounds, answer_seconds=0.2)
        with pytest.raises(TookTooLongError, match=r"^took over 0\.2 seconds$"):
            await asked.ask(SLOW)
        asked.bounds = replace(asked.bounds, answer_seconds=30.0)
        await answers(asked, "2")
        assert pid_of(asked) != slow

    run(process(), test)


@pytest.mark.parametrize(
    ("question", "how"),
    [
        ("os.kill(os.getpid(), 9)", "^was ended by SIGKILL$"),
        ("os.abort()", "^was ended by SIGABRT$"),
        ("os._exit(3)", "^ended with exit code 3$"),
        ("1 / 0", "^ended with exit code 1$"),
        ("[os.close(one) for one in (0, OUTPUT)]; time.sleep(60)", "^stopped answering$"),
        ("raise BaseException('as a panic in Rust')", "^ended with exit code 1$"),
        ("0 # " + "x" * 20_000, "^answered more than is allowed$"),
        ("os.write(OUTPUT, b'nonsense' + bytes([10]))", "JSON is malformed"),
        ("os.write(OUTPUT, b'{}' + bytes([10]))", "missing required field"),
    ],
)
def test_one_that_dies_says_how(run: Any, question: str, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The next question has another child, and nothing of the first one's last words is in the log."""

    async def test(asked: Process) -> None:
        with pytest.raises(ChildDiedError, match=how):
            await asked.ask(question)
        await answers(asked, "1")

    run(process(), test)
    assert capfd.readouterr() == ("", "")


def test_what_libraries_print_is_no_answer(run: Any) -> None:
    async def test(asked: Process) -> None:
        await answers(asked, "os.write(1, bytes([10])); print(7, flush=True); os.write(2, bytes([10]))")
        await answers(asked, "1")

    run(process(), test)


def test_one_that_died_in_its_sleep_is_replaced_unnoticed(run: Any) -> None:
    async def test(asked: Process) -> None:
        await answers(asked, "1")
        assert asked._child is not None
        os.kill(pid_of(asked), signal.SIGKILL)
        os.waitid(os.P_PID, pid_of(asked), os.WEXITED | os.WNOWAIT)
        await answers(asked, "2")

    run(process(), test)


def test_who_gives_up_leaves_no_answer_for_the_next(run: Any) -> None:
    async def test(asked: Process) -> None:
        await answers(asked, "1")
        impatient = asyncio.create_task(asked.ask("time.sleep(0.3)"))
        await asyncio.sleep(0.1)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        await answers(asked, "2")

    run(process(), test)


def test_who_gives_up_while_it_starts_does_not_end_it(run: Any) -> None:
    """With a start that takes longer than anybody waits, there would never be a child."""

    async def test(asked: Process) -> None:
        impatient = asyncio.create_task(asked.ask("1"))
        await asyncio.sleep(0.01)
        starting = asked._starting
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert starting is not None
        assert starting is asked._starting
        await answers(asked, "2")

    run(process(), test)


@pytest.mark.parametrize(
    ("command", "reason"),
    [(["false"], "ended with exit code 1"), (["/nowhere/a"], "No such file"), (["sleep", "60"], "it took over 0.5 s")],
)
def test_one_that_does_not_start_is_our_fault(run: Any, command: list[str], reason: str) -> None:
    """And the next question tries again."""

    async def test(asked: Process) -> None:
        asked.start()
        for _ in range(2):
            with pytest.raises(UnavailableError, match=f"^the child could not be started: .*{reason}") as caught:
                await asked.ask("1")
            assert caught.value.retry_after_seconds
        asked._command, asked.bounds = COMMAND, replace(asked.bounds, start_seconds=30.0)
        await answers(asked, "1")

    run(process(command, start_seconds=0.5), test)


@contextmanager
def descriptors(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_it_is_a_503(run: Any) -> None:
    async def test(asked: Process) -> None:
        with descriptors(3), pytest.raises(UnavailableError, match=r"could not be started: .*Too many open files"):
            await asked.ask("1")
        await answers(asked, "1")
        with descriptors(3):
            await answers(asked, "2")  # who has a child needs no more

    run(process(), test)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN])
def test_without_means_for_a_process_it_is_a_503(run: Any, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    genuine = subprocess.Popen

    def fail(*arguments: Any, **more: Any) -> Any:
        raise OSError(code, os.strerror(code))

    async def test(asked: Process) -> None:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(subprocess, "Popen", fail)
        with pytest.raises(UnavailableError, match=os.strerror(code)):
            await asked.ask("1")
        assert len(os.listdir("/proc/self/fd")) == before
        monkeypatch.setattr(subprocess, "Popen", genuine)
        await answers(asked, "1")

    run(process(), test)


def test_beyond_1024_descriptors(run: Any) -> None:
    """`select.select` knows none of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("this machine has too few descriptors")

    async def test(asked: Process) -> None:
        with descriptors(2000):
            many = [os.dup(0) for _ in range(1100)]
            try:
                await answers(asked, "1")
                assert asked._child is not None
                assert asked._child._socket.fileno() >= 1024
            finally:
                for one in many:
                    os.close(one)

    run(process(), test)


def test_too_many_and_too_long_a_queue(run: Any) -> None:
    async def test(asked: Process) -> None:
        await answers(asked, "1")
        first = asyncio.create_task(asked.ask(SLOW))
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError, match=r"the child was busy for 0\.1 seconds") as caught:
            await asked.ask("2")
        assert caught.value.param == "prompt"
        second = asyncio.create_task(asked.ask("3"))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="too many requests wait for the child"):
            await asked.ask("4")
        first.cancel()
        assert await second == Echo("3")

    run(process(wait_seconds=0.1, max_asking=2), test)


def test_closing_ends_what_runs_waits_and_comes(run: Any) -> None:
    async def test(asked: Process) -> None:
        await answers(asked, "1")
        waiting = [asyncio.create_task(asked.ask(text)) for text in (SLOW, "2")]
        await asyncio.sleep(0.1)
        asked.close()
        for one in [*waiting, asyncio.create_task(asked.ask("3"))]:
            with pytest.raises(UnavailableError) as caught:
                await one
            assert caught.value.code == "stopping"

    run(process(), test)


def test_closing_while_it_starts(run: Any) -> None:
    async def test(asked: Process) -> None:
        asked.start()
        waiting = asyncio.create_task(asked.ask("1"))
        await asyncio.sleep(0.01)
        asked.close()
        with pytest.raises(UnavailableError, match="stopping"):
            await waiting

    run(process(["sleep", "60"]), test)


def test_an_answer_that_nobody_waits_for_any_more_ends() -> None:
    """Its parent was killed: the child computes no longer than anybody would have waited."""
    with subprocess.Popen([*COMMAND, "orphan"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(b'"while True: pass"\n')
        child.stdin.close()
        assert child.wait(PATIENCE_SECONDS) == -signal.SIGALRM
