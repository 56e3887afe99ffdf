"""The process as its supervisor sees it: ready, draining, dead, and the exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.support.clients import honest_body, honest_until, send
from tests.support.fake_engine import write_bundle
from tests.support.server_process import ROOT, Server, engine_process, server
from tests.support.waiting import PATIENCE_SECONDS, wait_for

FAKE = "tests.support.fake_server"


def is_draining(running: Server) -> bool:
    return running.get("/readyz") == (503, b'{"status":"draining"}')


def is_refusing(running: Server) -> bool:
    return running.post("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 503


def sequences_of(running: Server) -> float:
    """Those that its engine knows of."""
    return running.metric("xlora_requests_running") + running.metric("xlora_requests_waiting")


def test_sigterm_drains(tiny_bundle: Path) -> None:
    """An orchestrator's stop must not cost a client its answer; the exit code is 0 and the engine process is gone.

    Meanwhile the server answers: 503 with Retry-After to the new. What takes too long hears why. The signal goes to
    the whole group, as systemd's and a shell's do: the engine must not die of it.
    """
    long = {"prompt": [5, 6, 7], "max_tokens": 900, "n": 16, "ignore_eos": True, "stream": True}
    long |= {"logprobs": 20, "return_scalings": "full"}

    async def scene(running: Server) -> tuple[list[int], str]:
        reader, writer = await send(running.port, json.dumps(long).encode())
        await reader.readuntil(b"data: ")
        stop = partial(os.killpg, running.process.pid, signal.SIGTERM)
        short = asyncio.create_task(honest_until(running.port, 4, stop))
        assert await asyncio.to_thread(wait_for, partial(is_refusing, running))
        assert await asyncio.to_thread(running.get, "/readyz") == (503, b'{"status":"draining"}')
        assert await asyncio.to_thread(running.get, "/livez") == (200, b'{"status":"ok"}')
        tokens, rest = await short, (await reader.read()).decode()
        writer.close()
        return tokens, rest

    flags = ("--model", str(tiny_bundle), "--threads", "1", "--drain-seconds", "2")
    with server(*flags, start_new_session=True) as running:
        engine = engine_process(running)
        tokens, rest = asyncio.run(scene(running))
        assert len(tokens) == honest_body(4)["max_tokens"]
        assert '"code":"stopping"' in rest
        assert "[DONE]" not in rest
        assert running.process.wait(PATIENCE_SECONDS) == 0
        assert not engine.is_running()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_engine_ends_the_service(tmp_path: Path, how: signal.Signals) -> None:
    """The API process outlives its engine just long enough to say so, with a reason: 500, or 503 where it has already
    noticed; probes red, exit code 3.
    """
    flags = ("--model", str(write_bundle(tmp_path)), "--engine-timeout", "2")
    with (tmp_path / "stderr").open("wb") as log, server(*flags, module=FAKE, stderr=log) as running:
        assert running.get("/livez")[0] == 200
        engine = engine_process(running)
        engine.send_signal(how)
        status, answer = running.post("/generate", {"prompt": "a"})  # waits where the engine does not answer
        assert status in ((500, 503) if how is signal.SIGKILL else (500,))
        assert "engine" in answer["error"]["message"]
        assert running.get("/livez")[0] == 503
        assert running.get("/readyz")[0] == 503
        assert running.process.wait(PATIENCE_SECONDS) == 3
        last = (tmp_path / "stderr").read_text().splitlines()[-2:]
        reason = "SIGKILL" if how is signal.SIGKILL else "has not answered for 2 s"
        assert reason in last[0]
        assert last[0].startswith("error: the engine is lost")
        assert not engine.is_running()


def test_an_engine_that_stands_still_is_not_ready_until_it_goes_on(tmp_path: Path) -> None:
    """Load balancers send their requests elsewhere; nothing is restarted, and what was asked is answered."""
    flags = ("--model", str(write_bundle(tmp_path)), "--stall-seconds", "0.3")
    with (
        (tmp_path / "stderr").open("wb") as log,
        server(*flags, module=FAKE, stderr=log) as running,
        ThreadPoolExecutor(1) as thread,
    ):
        engine = engine_process(running)
        engine.suspend()
        asked = thread.submit(running.post, "/generate", {"prompt": "a"})
        assert wait_for(lambda: running.get("/readyz") == (503, b'{"status":"stalled"}'))
        assert running.get("/livez")[0] == 200
        assert running.metric('xlora_state{state="stalled"}') == 1
        assert running.metric('xlora_state{state="ok"}') == 0
        assert wait_for(lambda: "has made no step for 0.3 s" in (tmp_path / "stderr").read_text())
        engine.resume()
        assert asked.result(PATIENCE_SECONDS)[0] == 200
        assert wait_for(lambda: running.get("/readyz")[0] == 200)


def test_a_second_ctrl_c_cuts_off_what_runs_and_says_so(tiny_bundle: Path, tmp_path: Path) -> None:
    """Streams end with an error event and other calls with an error, in our shape. Who does not read, or has not sent
    its body, is closed. Nothing of it is a traceback.
    """
    long = {"prompt": [5, 6, 7], "max_tokens": 900, "n": 16, "ignore_eos": True}
    much = long | {"stream": True, "logprobs": 20, "return_scalings": "full"}

    async def scene(running: Server) -> tuple[bytes, bytes]:
        stream, stream_writer = await send(running.port, json.dumps(long | {"stream": True}).encode())
        await stream.readuntil(b"data: ")
        whole, whole_writer = await send(running.port, json.dumps(long).encode())
        with socket.create_connection(("127.0.0.1", running.port)) as deaf, socket.socket() as silent:
            payload = json.dumps(much).encode()
            deaf.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            deaf.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(payload), payload))
            silent.connect(("127.0.0.1", running.port))
            silent.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            assert await asyncio.to_thread(wait_for, lambda: sequences_of(running) == 3 * 16)
            running.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(wait_for, partial(is_draining, running))
            running.process.send_signal(signal.SIGINT)
            answers = await asyncio.wait_for(asyncio.gather(stream.read(), whole.read()), PATIENCE_SECONDS)
            assert await asyncio.to_thread(running.process.wait, PATIENCE_SECONDS) == 130
        for writer in (stream_writer, whole_writer):
            writer.close()
        return answers[0], answers[1]

    with (tmp_path / "stderr").open("wb") as log:
        flags = ("--model", str(tiny_bundle), "--threads", "1", "--drain-delay", "3600", "--drain-seconds", "3600")
        with server(*flags, stderr=log) as running:
            streamed, whole = asyncio.run(scene(running))
    assert b'"code":"stopping"' in streamed
    assert streamed.endswith(b"\r\n0\r\n\r\n")
    assert b"[DONE]" not in streamed
    head, _, body = whole.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 500")
    assert b"x-request-id: " in head
    assert json.loads(body)["error"]["message"] == "the server stopped"
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said
    assert said.count("3 unfinished requests are ended: a second signal came") == 1


def test_unknown_variable_is_refused() -> None:
    """A misspelt variable that is silently ignored costs an afternoon."""
    finished = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=ROOT,
        env=os.environ | {"XLORA_MAX_NUM_SEQ": "3"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert finished.returncode == 1
    assert "XLORA_MAX_NUM_SEQS" in finished.stderr


def test_a_server_that_is_killed_while_it_works_leaves_nothing(tmp_path: Path) -> None:
    """The engine's process follows, and the port is free. That an idle one's does, and that the same command serves
    again: test_cli.py.
    """
    long = json.dumps({"prompt": "a", "max_tokens": 1_000_000, "stream": True}).encode()

    async def cut_off(running: Server) -> bytes:
        reader, writer = await send(running.port, long)
        await reader.readuntil(b"data: ")
        running.process.kill()
        rest = await reader.read()
        writer.close()
        return rest

    flags = ("--model", str(write_bundle(tmp_path)))
    with server(*flags, module=FAKE, env={"FAKE_LOADER": "load_slow_engine"}) as running:
        engine = engine_process(running)
        assert b"[DONE]" not in asyncio.run(cut_off(running))
        assert running.process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        engine.wait(PATIENCE_SECONDS)
        with socket.create_server(("127.0.0.1", running.port)):
            pass
