"""The process as its supervisor sees it: ready, draining, dead, and the exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.e2e.test_chaos import honest, honest_body
from tests.server_process import ROOT, Server, server


def serve(*flags: str) -> subprocess.CompletedProcess[str]:
    """Starts a server that is expected to end by itself."""
    command = [sys.executable, "-m", "service", "serve", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def engine_process(running: Server) -> psutil.Process:
    """The child that holds the model."""
    return next(
        child
        for child in psutil.Process(running.process.pid).children(recursive=True)
        if "service.engine.worker" in child.cmdline()
    )


def test_sigterm_lets_running_requests_finish(tiny_bundle: Path) -> None:
    """An orchestrator's stop must not cost a client its answer; the exit code is 0 and the engine process is gone."""

    async def scene(running: Server) -> list[int]:
        request = asyncio.create_task(honest(running.port, 4))
        await asyncio.sleep(0.05)
        running.process.send_signal(signal.SIGTERM)
        return await request

    with server("--model", str(tiny_bundle), "--threads", "1") as running:
        engine = engine_process(running)
        tokens = asyncio.run(scene(running))
        assert len(tokens) == honest_body(4)["max_tokens"]
        assert running.process.wait(30) == 0
        assert not engine.is_running()


def test_death_of_the_engine_is_seen(tiny_bundle: Path) -> None:
    """The API process outlives its engine just long enough to say so: 503 with a reason, probes red."""
    with server("--model", str(tiny_bundle), "--threads", "1", stderr=subprocess.DEVNULL) as running:
        assert running.get("/livez")[0] == 200
        engine_process(running).kill()
        deadline = time.monotonic() + 5
        while running.get("/livez")[0] == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running.get("/livez")[0] == 503
        assert running.get("/readyz")[0] == 503
        status, answer = running.post("/generate", honest_body(1))
        assert status == 503
        assert "engine" in answer["error"]["message"]


def test_death_of_the_server_ends_the_engine(tiny_bundle: Path) -> None:
    """SIGKILL leaves no orphan with the model in memory."""
    with server("--model", str(tiny_bundle), "--threads", "1") as running:
        engine = engine_process(running)
        running.process.kill()
        engine.wait(10)


def test_port_in_use_is_one_line_and_exit_code_1(tiny_bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finished = serve("--model", str(tiny_bundle), "--port", str(taken.getsockname()[1]))
    assert finished.returncode == 1
    assert "in use" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_missing_model_is_named_and_exit_code_1(tmp_path: Path) -> None:
    finished = serve("--model", str(tmp_path / "nowhere"), "--port", "0")
    assert finished.returncode == 1
    assert "nowhere" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_unknown_variable_is_refused() -> None:
    """A misspelt variable that is silently ignored costs an afternoon."""
    finished = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=ROOT,
        env=os.environ | {"XLORA_MAX_NUM_SEQ": "3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 1
    assert "XLORA_MAX_NUM_SEQS" in finished.stderr
