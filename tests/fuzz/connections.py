"""Connections as no client should behave, many at once and seeded: cut anywhere, half sent, dribbled, piled up, never
read, reset. Afterwards nothing of them may be left.

Knows raw sockets and the server's metrics; what bodies, paths and headers may contain is fuzzed elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from tests.support.server_process import Server, server

SEATS, WAITING = 16, 8
FLAGS = (
    *("--max-num-seqs", str(SEATS), "--max-queued-requests", str(WAITING), "--max-model-len", "128"),
    *("--keep-alive", "5", "--write-timeout", "5", "--threads", "1"),
)
CROWD = 24  # at once
PATIENCE_SECONDS = 3.0  # of one connection; the server's own times are longer
SETTLE_SECONDS = 15.0  # the latest of the requests that were left ends by its own timeout
GAUGES = ("xlora_requests_running", "xlora_requests_waiting", "xlora_kv_blocks_used_ratio")


class Visitor:
    """One connection to the server."""

    def __init__(self, rng: random.Random, port: int) -> None:
        self.rng, self._port = rng, port
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if rng.random() < 0.3:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)

    async def connect(self) -> None:
        await asyncio.get_running_loop().sock_connect(self.socket, ("127.0.0.1", self._port))

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def read(self, most: int = 1 << 20) -> bytes:
        """What comes within a moment, up to the end of the connection or to `most` bytes."""
        found = b""
        try:
            async with asyncio.timeout(self.rng.choice([0.05, 0.5, PATIENCE_SECONDS])):
                while len(found) < most:
                    data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
                    if not data:
                        break
                    found += data
        except TimeoutError:
            pass
        return found

    def close(self, reset: bool) -> None:
        if reset:  # what the other side still sends is answered with RST
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def request(self, last: bool = True) -> bytes:
        """A good request, most often; whole."""
        rng = self.rng
        path, body = rng.choice(
            [
                ("/livez", None),
                ("/v1/models", None),
                ("/openapi.json", None),
                ("/web/app.js", None),
                ("/tokenize", {"prompt": "a" * rng.randrange(2000)}),
                ("/scalings", {"prompt": [5, 6, 7], "perplexity": rng.random() < 0.5}),
                ("/generate", self._generation()),
                ("/generate", self._generation()),
                ("/v1/completions", {"prompt": [5, 6], "max_tokens": rng.randrange(1, 90), "timeout": 2}),
                ("/compare", {"prompt": [5, 6], "settings": [{}, {"experts": {"only": []}}], "timeout": 2}),
                ("/generate", {"prompt": ""}),
            ]
        )
        payload = b"" if body is None else json.dumps(body).encode()
        version = rng.choice(["1.1"] * 8 + ["1.0"])
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/{version}", "Host: x"]
        lines += ["Content-Type: application/json"] if payload else []
        lines += rng.choice([[]] * 8 + [["Connection: close"], ["Connection: Upgrade", "Upgrade: h2c"]]) if last else []
        lines += ["Expect: 100-continue"] if payload and rng.random() < 0.1 else []
        if payload and rng.random() < 0.3:
            cut = rng.randrange(1, len(payload) + 1)
            chunks = [payload[:cut], payload[cut:]]
            payload = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks if chunk) + b"0\r\n\r\n"
            lines.append("Transfer-Encoding: chunked")
        elif payload or rng.random() < 0.1:
            lines.append(f"Content-Length: {len(payload)}")
        return "\r\n".join([*lines, "", ""]).encode() + payload

    def _generation(self) -> dict[str, Any]:
        rng = self.rng
        wishes = {"logprobs": 20, "return_scalings": "full"} if rng.random() < 0.5 else {}
        fields = {"stream": rng.random() < 0.7, "n": rng.choice([1, 1, 4]), "timeout": rng.choice([1, 2])}
        return {"prompt": [5, 6, 7], "max_tokens": rng.randrange(1, 110), "ignore_eos": True} | fields | wishes


Behaviour = Callable[[Visitor], Awaitable[None]]


async def says_nothing(visitor: Visitor) -> None:
    await visitor.read()


async def is_cut_anywhere(visitor: Visitor) -> None:
    """In its head, in its body, or just after."""
    request = visitor.request()
    await visitor.send(request[: visitor.rng.randrange(len(request) + 1)])
    await asyncio.sleep(visitor.rng.choice([0, 0, 0.05]))


async def leaves_in_the_middle_of_the_answer(visitor: Visitor) -> None:
    await visitor.send(visitor.request())
    await visitor.read(visitor.rng.randrange(1, 20_000))


async def asks_one_thing_after_the_other(visitor: Visitor) -> None:
    for _ in range(visitor.rng.randrange(1, 6)):
        await visitor.send(visitor.request(last=False))
        await visitor.read(1)
        await visitor.send(visitor.rng.choice([b"", b"\r\n", b"\n\r\n\r", b"x", b"\x00", b"G"]))


async def asks_all_at_once(visitor: Visitor) -> None:
    """Pipelined, and perhaps cut."""
    requests = b"".join(visitor.request(last=False) for _ in range(visitor.rng.randrange(2, 9)))
    await visitor.send(requests[: len(requests) - visitor.rng.choice([0, 0, 7])])
    await visitor.read()


async def dribbles(visitor: Visitor) -> None:
    request = visitor.request()
    for start in range(0, min(len(request), 400), 10):
        await visitor.send(request[start : start + 10])
        await asyncio.sleep(0.005)
    await visitor.send(request[400:])
    await visitor.read()


async def never_reads(visitor: Visitor) -> None:
    await visitor.send(visitor.request())
    await asyncio.sleep(PATIENCE_SECONDS)


async def sends_noise(visitor: Visitor) -> None:
    start = visitor.request()[: visitor.rng.randrange(30)]
    await visitor.send(start + visitor.rng.randbytes(visitor.rng.randrange(1, 50_000)))
    await visitor.read()


async def ends_its_half(visitor: Visitor) -> None:
    """As `nc` does: nothing more will come, and the answer is still wanted."""
    await visitor.send(visitor.request())
    visitor.socket.shutdown(socket.SHUT_WR)
    await visitor.read()


BEHAVIOURS: list[Behaviour] = [
    says_nothing,
    is_cut_anywhere,
    leaves_in_the_middle_of_the_answer,
    asks_one_thing_after_the_other,
    asks_all_at_once,
    dribbles,
    never_reads,
    sends_noise,
    ends_its_half,
]


async def visit(rng: random.Random, port: int) -> str:
    behave = rng.choice(BEHAVIOURS)
    visitor = Visitor(rng, port)
    try:
        async with asyncio.timeout(4 * PATIENCE_SECONDS):
            await visitor.connect()
            await behave(visitor)
    except (ConnectionError, TimeoutError):
        pass
    finally:
        visitor.close(reset=rng.random() < 0.5)
    return behave.__name__


async def crowd(port: int, count: int, seconds: float, seed: int) -> Counter[str]:
    """`count` visitors, or as many as come in the time; how many there were of each kind."""
    deadline = time.monotonic() + seconds
    seen: Counter[str] = Counter()
    numbers = iter(range(count))

    async def visitors() -> None:
        for number in numbers:
            if time.monotonic() > deadline:
                return
            seen[await visit(random.Random(f"{seed}-{number}"), port)] += 1

    await asyncio.gather(*(visitors() for _ in range(CROWD)))
    return seen


def fuzz_connections(*flags: str, count: int, seconds: float, seed: int) -> Counter[str]:
    """One run against a server of its own. Raises AssertionError for what the visitors have left behind: seats, blocks,
    descriptors, a traceback in the log, or a server that is not ready.
    """
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        log = Path(directory) / "log"
        running = stack.enter_context(server(*FLAGS, *flags, stderr=stack.enter_context(log.open("wb"))))
        process = psutil.Process(running.process.pid)
        descriptors = process.num_fds()
        seen = asyncio.run(crowd(running.port, count, seconds, seed))
        deadline = time.monotonic() + SETTLE_SECONDS
        while left := {name: running.metric(name) for name in GAUGES if running.metric(name)}:
            assert time.monotonic() < deadline, f"after {dict(seen)}, seed {seed}: {left}"
            time.sleep(0.2)
        while process.num_fds() > descriptors:
            assert time.monotonic() < deadline, f"after {dict(seen)}, seed {seed}: {process.num_fds()} descriptors"
            time.sleep(0.2)
        assert every_seat_is_free(running), f"after {dict(seen)}, seed {seed}"
        assert running.get("/readyz")[0] == 200
        text = log.read_text(errors="replace")
        assert "Traceback" not in text, text[-5000:]
    return seen


def every_seat_is_free(running: Server) -> bool:
    """Whether as many choices are admitted as may be, which the queue's accounts alone decide."""
    body = {"prompt": [5, 6, 7], "max_tokens": 120, "ignore_eos": True, "stream": True, "timeout": 5}
    with ExitStack() as stack:
        for n in (SEATS, 1):  # the second is the first that waits: bounds are for those after it
            holder = stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            payload = json.dumps(body | {"n": n}).encode()
            head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            holder.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
            time.sleep(0.1)
        return running.post("/generate", {"prompt": [5], "max_tokens": 1, "n": WAITING - 1})[0] == 200
