"""The real server as a process of its own, on a free port: for end-to-end tests and benchmarks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
_NOTHING: Mapping[str, str] = {}


@dataclass
class Server:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        return self._open(urllib.request.Request(self._url(path)))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and parsed body of a POST; bytes are sent as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self._url(path), data, {"Content-Type": "application/json"})
        status, answer = self._open(request)
        return status, json.loads(answer)

    def metric(self, name: str) -> float:
        """One sample from /metrics; the name may have labels, as they stand there."""
        lines = self.get("/metrics")[1].decode().splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _open(self, request: urllib.request.Request) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(
    *flags: str,
    module: str = "service",
    command: str = "serve",
    ready_seconds: float = 300.0,  # the first on a machine compiles native kernels
    root: Path = ROOT,
    env: Mapping[str, str] = _NOTHING,
    **popen: Any,
) -> Iterator[Server]:
    """Starts `xlora-serve serve`, or another command that serves, of the checkout at `root`, waits until it is ready,
    and ends it with SIGTERM. Another `module` than the product's is one that changes it first.
    """
    port = free_port()
    line = [sys.executable, "-m", module, command, "--port", str(port), "--log-level", "warning", *flags]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | env
    running = Server(port, subprocess.Popen(line, cwd=root, env=variables, **popen))
    try:
        _wait_ready(running, ready_seconds)
        yield running
    finally:
        running.process.terminate()
        try:
            running.process.wait(30)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()


def _wait_ready(running: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {running.process.returncode}")
        try:
            if running.get("/readyz")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {seconds} s")


def engine_process(running: Server) -> psutil.Process:
    """The child that holds the model."""
    return next(
        child
        for child in psutil.Process(running.process.pid).children(recursive=True)
        if "service.engine.worker" in child.cmdline()
    )
