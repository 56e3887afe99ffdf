"""A light streaming client: raw sockets, no parsing beyond line breaks, so that measuring costs the machine little."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Streamed:
    """One streamed answer: when it was asked for and when each token came, in seconds of one monotonic clock."""

    started: float
    token_times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def first_token_seconds(self) -> float:
        return self.token_times[0] - self.started

    @property
    def gaps_seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


async def stream_generate(port: int, body: dict[str, Any]) -> Streamed:
    """POST /generate with stream on. Raises RuntimeError when the status is not 200."""
    payload = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    answer = Streamed(time.perf_counter())
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + payload)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read()).decode(errors="replace"))
    last = b""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            if b'"usage"' in line:
                last = line
            else:
                answer.token_times.append(time.perf_counter())
    writer.close()
    if not last:
        raise RuntimeError("the stream ended without usage")
    answer.usage = json.loads(last[6:])["usage"]
    return answer
