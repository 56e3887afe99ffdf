"""Request lines and headers over raw sockets against the real server: spellings of paths, odd methods, odd heads.

    python -m tests.fuzz.paths [SECONDS [SEED]]

What must hold whatever is sent: no 5xx; every error that is answered has our shape and an id; nothing is served to
whom its route does not serve; no header of ours is the client's; and nobody but an operator changes anything.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote

import httptools

from service.api.middleware.security import ADMIN_ROUTES, OPEN_ROUTES
from tests.support.server_process import Server, server
from tests.support.spellings import CONTROL, spellings

KEY, ADMIN = "a-key-for-the-fuzzer", "an-admin-key-for-the-fuzzer"
PATHS = (
    *sorted(OPEN_ROUTES | ADMIN_ROUTES),
    *("/web/index.html", "/generate", "/compare", "/scalings", "/tokenize", "/detokenize", "/docs", "/openapi.json"),
    *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/demo", "/nowhere"),
)
# How the answers of an operator's routes begin.
_OPERATORS = re.compile(
    rb'# HELP|PK\x03|\{"(status":"[\w ]+","model|model":"\w+","architecture|scaling_pass_value|enabled)"'
)
BODIES = (
    b"",
    b"{}",
    b'{"global_scaling_weight": 0.0}',
    b'{"enabled": true}',
    b'{"prompt": "a", "max_tokens": 1}',
    b"[" * 500,
)
_GUARDED = sorted(ADMIN_ROUTES)
_READING = ("GET", "GET", "HEAD", "OPTIONS")
_METHODS = (*_READING, "POST", "PUT", "PATCH", "DELETE")
_ODD_METHODS = (
    *("TRACE", "CONNECT", "PROPFIND", "M-SEARCH", "QUERY", "PRI"),
    *("get", "G ET", "", "GET\t", "A" * 300, "GÉT", "GET\0"),
)
_ANSWER_SECONDS = 0.3
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@dataclass
class Case:
    """One request as it is sent, and whose key it has."""

    method: str
    target: bytes
    headers: bytes
    body: bytes
    key: str | None

    @property
    def payload(self) -> bytes:
        line = b"%s %s HTTP/1.1\r\n" % (self.method.encode("latin-1"), self.target)
        return line + self.headers + b"\r\n" + self.body

    @property
    def path(self) -> str | None:
        """As the server's parser reads it; None where it reads none."""
        try:
            return unquote(httptools.parse_url(self.target).path.decode("ascii"))
        except (httptools.HttpParserError, AttributeError, UnicodeDecodeError):
            return None


def cases(rng: random.Random) -> Iterator[Case]:
    """Without end: odd paths with good heads, and good paths with odd heads."""
    all_spellings = {path: list(spellings(path)) for path in PATHS}
    while True:
        path = rng.choice(PATHS if rng.random() < 0.5 else _GUARDED)
        key = rng.choice((None, KEY, KEY, ADMIN))
        reading = key == ADMIN or rng.random() < 0.5
        method = rng.choice(_READING if reading else _METHODS)
        if rng.random() < 0.5:
            spelling = path + rng.choice(CONTROL) if rng.random() < 0.3 else rng.choice(all_spellings[path])
            target = spelling.encode("latin-1")
            if rng.random() < 0.3:
                target = _mutated(target, rng)
            yield Case(method, target.replace(b" ", b"%20"), _plain_head(b"") + _authorization(key, rng), b"", key)
            continue
        if not reading and rng.random() < 0.1:
            method = rng.choice(_ODD_METHODS)
        body = b"" if reading else rng.choice(BODIES)
        headers = rng.choice(_HEADS)(rng, body) + _authorization(key, rng)
        yield Case(method, path.encode(), headers, body, key)


def _mutated(target: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        target = rng.choice((b"http://host", b"https://u:p@host:1", b"//host", b"HTTP://[::1]", b"http://")) + target
    place = rng.randrange(len(target) + 1)
    inserted = rng.choice((b"%%%02x" % rng.randrange(256), bytes([rng.randrange(256)]), b"", b"?", b"#", b"%"))
    return target[:place] + inserted + target[place + rng.randrange(2) :]


def _plain_head(body: bytes) -> bytes:
    return b"Host: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(body)


def _framed(*lines: bytes) -> Callable[[random.Random, bytes], bytes]:
    """A head whose statements about the body are these."""
    return lambda rng, body: b"Host: x\r\nConnection: close\r\n" + b"".join(line + b"\r\n" for line in lines)


def _with(*lines: bytes) -> Callable[[random.Random, bytes], bytes]:
    """A good head with these lines too."""
    return lambda rng, body: _plain_head(body) + b"".join(line + b"\r\n" for line in lines)


def _random_header(rng: random.Random, body: bytes) -> bytes:
    name = rng.choice((b"X-Request-Id", b"Host", b"traceparent", b"Range", b"Origin", b"Cookie", b"Accept", b"X-A"))
    value = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 200))))
    return (
        _plain_head(body) + name + b": " + value.replace(b"\r", b"").replace(b"\n", rng.choice((b"", b"\n"))) + b"\r\n"
    )


_HEADS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _random_header,
    _framed(b"Content-Length: 2", b"Content-Length: 3"),
    _framed(b"Content-Length: 2", b"Transfer-Encoding: chunked"),
    _framed(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
    _framed(b"Transfer-Encoding: xchunked"),
    _framed(b"Transfer-Encoding : chunked"),
    _framed(b"Content-Length: -1"),
    _framed(b"Content-Length: 0x10"),
    _framed(b"Content-Length: " + b"9" * 40),
    _framed(b"Content-Length: 99999999"),
    _framed(b"Content-Length: \xb2"),
    _with(b"A" * 20_000 + b": b"),
    _with(b"A: " + b"b" * 100_000),
    _with(*(b"A%d: b" % number for number in range(3000))),
    _with(b": no name"),
    _with(b"no colon"),
    _with(b"A\0: b"),
    _with(b"A: b\0c"),
    _with(b"N\xe4me: v\xe4lue"),
    _with(b" folded: a"),
    _with(b"A: b\r\n c"),
    _with(b"X-Request-Id: a\rX-Injected: 1"),
    _with(b"X-Request-Id: a%0d%0aX-Injected: 1"),
    _with(b"Host: evil/metrics?"),
    _with(b"Host: ["),
    _with(b"Host: a\r\nHost: b"),
    _with(b"X-Forwarded-Prefix: /metrics", b"X-Original-URL: /metrics", b"X-Rewrite-URL: /metrics"),
    _with(b"X-HTTP-Method-Override: PATCH", b"X-Forwarded-Host: evil"),
    _with(b"Origin: null", b"Access-Control-Request-Method: PATCH"),
    _with(b"Range: bytes=0-,5-2,-"),
    _with(b"Expect: 100-continue"),
    _with(b"Expect: nonsense"),
    _with(
        b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: " + b"a" * 22
    ),
    _with(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
    lambda rng, body: b"",
)


def _authorization(key: str | None, rng: random.Random) -> bytes:
    """The key's header; where there is no key, sometimes one that is nearly right."""
    if key is not None:
        return b"Authorization: Bearer %s\r\n" % key.encode()
    wrong = (KEY[:-1], ADMIN.upper(), f"{KEY}, {ADMIN}", f"{KEY}\0", f"Bearer {KEY}", KEY[::-1], "", "*", f"{ADMIN};")
    value = rng.choice(("", "", *(f"Bearer {one}" for one in wrong), f"Basic {KEY}", f"Token {ADMIN}", KEY))
    return b"Authorization: %s\r\n" % value.encode() if value else b""


def exchange(port: int, payload: bytes) -> bytes:
    """Everything that one connection answers, until it is closed or says nothing for a while."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_SECONDS) as connection:
        try:
            connection.sendall(payload)
            while data := connection.recv(1 << 16):
                answer += data
        except (ConnectionError, TimeoutError):
            pass
    return answer


def problems(case: Case, answer: bytes) -> Iterator[str]:
    """What is wrong with an answer; nothing at all is none where a request is not complete or not HTTP."""
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    if not answer:
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    found = _STATUS.match(head)
    if found is None:
        yield "the answer is not HTTP"
        return
    status = int(found[1])
    if status >= 500:
        yield f"status {status}"
    if b"x-injected" in head.lower():
        yield "a header of the client's is in the answer"
    if status >= 400 and case.method != "HEAD" and not _is_error(body):
        yield f"{status} is not in our shape"
    if case.key is None and status < 300 and not _is_open(case.path):
        yield "served without a key"
    if case.key != ADMIN and _OPERATORS.match(body):
        yield "an operator's content without an admin key"


def _is_open(path: str | None) -> bool:
    return path is not None and (path in OPEN_ROUTES - {"/web"} or path.startswith("/web/"))


def _is_error(body: bytes) -> bool:
    try:
        return {"message", "type", "param", "code"} <= set(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return False


def fuzz_paths(running: Server, seconds: float, seed: int, most: int = 1 << 30) -> tuple[Counter[str], list[str]]:
    """How often each status was answered, and every problem with the request that has it."""
    rng = random.Random(seed)
    before = _state(running)
    deadline = time.monotonic() + seconds
    statuses: Counter[str] = Counter()
    found: list[str] = []
    for number, case in enumerate(cases(rng)):
        if number == most or time.monotonic() > deadline:
            break
        answer = exchange(running.port, case.payload)
        statuses[answer[9:12].decode("latin-1") or "nothing"] += 1
        found += [f"{problem}: {case.payload[:300]!r} -> {answer[:300]!r}" for problem in problems(case, answer)]
    if running.get("/readyz")[0] != 200:
        found.append("the server is not ready any more")
    if _state(running) != before:
        found.append("somebody without an admin key has changed the server")
    return statuses, found


def _state(running: Server) -> tuple[bytes, ...]:
    head = _plain_head(b"") + b"Authorization: Bearer %s\r\n\r\n" % ADMIN.encode()
    paths = (b"/gate", b"/scalings/log")
    return tuple(
        exchange(running.port, b"GET %s HTTP/1.1\r\n" % path + head).partition(b"\r\n\r\n")[2] for path in paths
    )


def main(arguments: list[str]) -> int:
    """The full run, on the demo."""
    seconds, seed = [*map(float, arguments), *(20.0, 0.0)[len(arguments) :]]
    os.environ["XLORA_API_KEYS"], os.environ["XLORA_ADMIN_KEYS"] = KEY, ADMIN
    with server("--threads", "1", "--max-model-len", "128", "--log-level", "error") as running:
        statuses, found = fuzz_paths(running, seconds, int(seed))
    print(f"paths and headers: {sum(statuses.values())} requests, {dict(sorted(statuses.items()))}")
    print(*found[:20], sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
