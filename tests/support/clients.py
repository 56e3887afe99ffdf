"""Clients of a server process over raw sockets: what they send, what they get, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

from tests.support.server_process import Server
from tests.support.waiting import wait_for

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Result = tuple[list[int], dict[str, Any] | None]  # the tokens that came, and the error after them


def honest_body(number: int) -> dict[str, Any]:
    """The request of this number, always the same."""
    rng = random.Random(number)
    body = {"prompt": [rng.randrange(2, 250) for _ in range(rng.randint(3, 90))], "max_tokens": rng.randint(5, 40)}
    return body | {"seed": number, "temperature": rng.choice([0, 0.8, 1.3]), "ignore_eos": True}


async def send(port: int, payload: bytes, key: str = "", path: str = "/generate") -> Streams:
    """Sends one POST, on a connection that is for it alone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + payload)
    await writer.drain()
    return reader, writer


async def status_and_body(port: int, payload: bytes) -> tuple[int, Any]:
    reader, writer = await send(port, payload)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def honest(port: int, number: int) -> list[int]:
    """The tokens of the request of this number."""
    status, answer = await status_and_body(port, json.dumps(honest_body(number)).encode())
    assert status == 200, answer
    tokens: list[int] = answer["outputs"][0]["token_ids"]
    return tokens


async def honest_until(port: int, number: int, begun: Callable[[], object]) -> list[int]:
    """The same as a stream; `begun` is called when its first token is there."""
    reader, writer = await send(port, json.dumps(honest_body(number) | {"stream": True}).encode())
    first = await reader.readuntil(b"data: ")
    begun()
    tokens, error = result_of_stream(first + await reader.read())
    writer.close()
    assert error is None
    return tokens


async def streamed(port: int, body: bytes) -> Result:
    """What a stream brings up to its error, or to its [DONE]."""
    reader, writer = await send(port, body)
    answer = await reader.read()
    writer.close()
    return result_of_stream(answer)


def result_of_stream(answer: bytes) -> Result:
    """What an answer to `stream: true` says, head included."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if int(head.split()[1]) != 200:
        return [], json.loads(rest)["error"]
    events = [line.removeprefix(b"data: ") for line in rest.splitlines() if line.startswith(b"data: ")]
    if events[-1] == b"[DONE]":
        return [id for event in events[:-2] for id in json.loads(event)["token_ids"]], None
    return [id for event in events[:-1] for id in json.loads(event)["token_ids"]], json.loads(events[-1])["error"]


def wait_idle(server: Server) -> None:
    """Nothing running, waiting or holding blocks."""
    names = ("xlora_requests_running", "xlora_requests_waiting", "xlora_kv_blocks_used_ratio")
    idle = wait_for(lambda: not any(server.metric(name) for name in names))
    assert idle, "requests of clients that went away still hold something"
