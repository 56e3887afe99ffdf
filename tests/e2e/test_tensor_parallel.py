"""A server whose model is computed by two processes: the same tokens, and an end of either that nobody hangs on."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.support.clients import honest, honest_body, honest_until
from tests.support.server_process import Server, engine_process, server
from tests.support.waiting import PATIENCE_SECONDS

FLAGS = ("--threads", "1", "--tensor-parallel", "2")


def rank_process(running: Server) -> psutil.Process:
    """Rank 1."""
    [rank] = [
        child
        for child in engine_process(running).children()
        if "service.engine.tensor_parallel.rank_worker" in child.cmdline()
    ]
    return rank


def test_a_dead_rank_ends_the_service(tiny_bundle: Path, tiny_server: Server, tmp_path: Path) -> None:
    """Killed while nothing runs: nobody waits for it, and still the probes turn red and the exit code is 3.

    Neither process dies of a SIGTERM or SIGINT of its own, which a signal to the whole group brings it, while a
    request runs: the server alone decides when they end.
    """
    expected = [asyncio.run(honest(tiny_server.port, number)) for number in range(5)]
    with (tmp_path / "stderr").open("wb") as log, server("--model", str(tiny_bundle), *FLAGS, stderr=log) as running:
        assert [asyncio.run(honest(running.port, number)) for number in range(4)] == expected[:4]
        engine, rank = engine_process(running), rank_process(running)

        def interrupt() -> None:
            for process, how in itertools.product((engine, rank), (signal.SIGTERM, signal.SIGINT)):
                process.send_signal(how)

        assert asyncio.run(honest_until(running.port, 4, interrupt)) == expected[4]
        rank.kill()
        assert running.process.wait(PATIENCE_SECONDS) == 3
        engine.wait(PATIENCE_SECONDS)
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert "error: the engine is lost: rank 1 of 2 was ended by SIGKILL, perhaps for want of memory" in lines
    assert "Traceback" not in "\n".join(lines)


@pytest.mark.slow  # that a rank survives the signal shows the test above; servers of two ranks take long to start
def test_sigterm_drains_and_leaves_nobody_behind(tiny_bundle: Path) -> None:
    """The signal goes to the whole process group: no rank may die of it while a request runs."""
    with server("--model", str(tiny_bundle), *FLAGS, start_new_session=True) as running:
        rank = rank_process(running)
        stop = partial(os.killpg, running.process.pid, signal.SIGTERM)
        assert len(asyncio.run(honest_until(running.port, 4, stop))) == honest_body(4)["max_tokens"]
        assert running.process.wait(PATIENCE_SECONDS) == 0
        rank.wait(PATIENCE_SECONDS)


@pytest.mark.slow  # two more servers of two ranks each
@pytest.mark.parametrize("victim", ["engine", "server"])
def test_death_of_the_others_ends_a_rank(tiny_bundle: Path, victim: str) -> None:
    """SIGKILL leaves no orphan with a part of the model in memory."""
    with server("--model", str(tiny_bundle), *FLAGS) as running:
        engine, rank = engine_process(running), rank_process(running)
        (running.process if victim == "server" else engine).kill()
        rank.wait(PATIENCE_SECONDS)
        if victim == "server":
            engine.wait(PATIENCE_SECONDS)
        else:
            assert running.process.wait(PATIENCE_SECONDS) == 3
