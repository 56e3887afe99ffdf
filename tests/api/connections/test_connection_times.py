"""The protocol over real sockets with short times: every connection that costs nothing to hold ends, and no other."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from service.api.connections.bounds import ConnectionLimits, HttpProtocol
from service.api.connections.open_connections import OpenConnections
from service.api.middleware.security import BodyLimit
from service.commands.serve import Server
from service.settings import Settings
from tests.support.waiting import PATIENCE_SECONDS, wait_for

Address = tuple[str, int]
SHORT = {"header_seconds": 0.4, "body_seconds": 0.5, "keep_alive_seconds": 0.8, "write_seconds": 0.5}
LONG = dict.fromkeys(SHORT, 30.0)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SIZE = 8 << 20  # more than the kernel's buffers hold


class Application:
    """/ answers at once, and reads no body; /slow after a second; /body what it was sent; /large SIZE bytes; /stream
    without an end.
    """

    def __init__(self) -> None:
        self.ended: list[str] = []  # paths of requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            await self._answer(path, receive, send)
        finally:
            self.ended.append(path)

    async def _answer(self, path: str, receive: Receive, send: Send) -> None:
        content = b"x" * SIZE if path.startswith("/large") else path.encode()
        if path == "/slow":
            await asyncio.sleep(1)
        if path == "/body":
            message = await receive()
            content = b"" if message["type"] == "http.disconnect" else message["body"]
        length = [] if path == "/stream" else [(b"content-length", b"%d" % len(content))]
        close = [(b"connection", b"close")] if path == "/large/close" else []
        await send({"type": "http.response.start", "status": 200, "headers": [*length, *close]})
        gone = asyncio.create_task(receive())
        while path == "/stream" and not gone.done():
            await send({"type": "http.response.body", "body": content * 1000, "more_body": True})
            await asyncio.sleep(0)
        gone.cancel()
        await send({"type": "http.response.body", "body": content if path != "/stream" else b""})


class Running:
    """A server in a thread."""

    def __init__(self, address: Address, server: uvicorn.Server, app: Application) -> None:
        self.address, self.server, self.app = address, server, app

    @property
    def open(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(self.address)
        connection.sendall(data)
        return connection


@contextmanager
def serving(
    loops: Callable[[], asyncio.AbstractEventLoop], times: dict[str, float], **config: str
) -> Iterator[Running]:
    app, listener = Application(), socket.create_server(("127.0.0.1", 0))
    limits, connections = ConnectionLimits(header_bytes=2048, **times), OpenConnections(look_seconds=0.1)
    protocol = partial(HttpProtocol, limits=limits, connections=connections)
    given = {"http": protocol, "ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
    server = Server(uvicorn.Config(app, **given, **config), None, connections)

    def run() -> None:
        with asyncio.Runner(loop_factory=loops) as runner:
            runner.run(server.serve([listener]))

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_for(lambda: server.started)
    try:
        yield Running(listener.getsockname(), server, app)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


_EITHER = [
    pytest.param(uvloop.new_event_loop, id="uvloop"),  # the server's
    pytest.param(asyncio.new_event_loop, id="asyncio", marks=pytest.mark.slow),
]
LOOPS = pytest.mark.parametrize("loops", _EITHER)


@pytest.fixture(scope="module", params=_EITHER)
def short(request: pytest.FixtureRequest) -> Iterator[Running]:
    with serving(request.param, SHORT) as running:
        yield running


def answer_of(connection: socket.socket, ends: bytes) -> bytes:
    """One answer, or several, up to these bytes of a body."""
    found = b""
    while not found.endswith(ends):
        data = connection.recv(4096)
        assert data, found
        found += data
    return found


def outliving(connections: dict[str, tuple[socket.socket, bytes]]) -> list[str]:
    """Which of some connections the server does not end, though each sends its bytes again and again."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    left = dict(connections)
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        for name, (connection, each) in list(left.items()):
            connection.settimeout(0)
            try:
                ended = not connection.recv(4096)
            except BlockingIOError:
                ended = False
            except ConnectionError:
                ended = True
            with suppress(ConnectionError):
                connection.sendall(each)
            if ended:
                connection.close()
                del left[name]
    return list(left)


def test_a_head_must_come_in_time(short: Running) -> None:
    """Nothing at all, something, something again and again."""
    starts = [b"", b"\r\n", b"G", b"GET / HTTP/1.1\r\nHo", b"GET / HTTP/1.1\r\nHost: x\r\n"]
    cases = {f"{start!r}, then {each!r}": (short.connect(start), each) for start in starts for each in (b"", b"a")}
    cases["line ends"] = (short.connect(), b"\r\n")
    assert outliving(cases) == []


def test_nothing_but_a_request_keeps_a_connection_after_an_answer(short: Running) -> None:
    """One stray byte used to stop the timer for good."""
    cases = {}
    for first, each in [
        (b"", b""),
        (b"\r\n", b""),
        (b"\n", b""),
        (b"", b"\r\n"),
        (b"G", b""),
        (b"G", b"A"),
        (GET[:9], b""),
    ]:
        connection = short.connect(GET)
        answer_of(connection, b"/")
        connection.sendall(first)
        cases[f"{first!r}, then {each!r}"] = (connection, each)
    assert outliving(cases) == []


@pytest.mark.parametrize("path", [b"/", b"/body"], ids=["answered at once", "waited for"])
def test_a_body_must_come_in_time(short: Running, path: bytes) -> None:
    """Whatever the method, and though the answer has been given."""
    cases = {}
    for method in (b"GET", b"HEAD", b"OPTIONS", b"POST", b"DELETE"):
        for length, each in [(b"Content-Length: 99999", b"a"), (b"Transfer-Encoding: chunked", b"1\r\na\r\n")]:
            head = method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n"
            cases[f"{head!r}, silent"] = (short.connect(head), b"")
            cases[f"{head!r}, slow"] = (short.connect(head), each)
    assert outliving(cases) == []


@pytest.mark.parametrize("version", [b"1.1\r\nConnection: close", b"1.0"])
def test_who_asks_for_one_answer_gets_one(short: Running, version: bytes) -> None:
    with short.connect(b"GET / HTTP/" + version + b"\r\nHost: x\r\n\r\n") as connection:
        answer_of(connection, b"/")
        assert connection.recv(1) == b""


def test_a_request_within_the_time_is_served_and_an_answer_may_take_long(short: Running) -> None:
    """An answer takes longer here than everything that is waited for."""
    with short.connect() as connection:
        for _ in range(3):
            time.sleep(0.3)
            connection.sendall(GET)
            answer_of(connection, b"/")
        connection.sendall(GET.replace(b"/ ", b"/slow "))
        answer_of(connection, b"/slow")
        time.sleep(0.3)
        connection.sendall(GET)
        answer_of(connection, b"/")
        assert outliving({"it": (connection, b"")}) == []


@pytest.mark.parametrize(
    "second", [GET, GET[:9], GET[:-2] + b"Content-Length: 9\r\n\r\n"], ids=["whole", "head", "body"]
)
def test_requests_in_one_go_are_answered_in_order(short: Running, second: bytes) -> None:
    """What has come of the second costs the first nothing, and has its whole time when its turn comes."""
    with short.connect(GET.replace(b"/ ", b"/slow ") + second) as connection:
        found = answer_of(connection, b"/slow" if second == GET[:9] else b"/")
        assert b"/slow" in found
        if second == GET[:9]:
            time.sleep(0.2)
            connection.sendall(GET[9:])
            answer_of(connection, b"/")
        assert outliving({"it": (connection, b"")}) == []


def test_many_requests_in_one_go_are_no_large_head(short: Running) -> None:
    """A hundred, and a half one that the limit on heads is not for."""
    with short.connect(GET * 100 + GET[:-2]) as connection:
        found = b""
        while found.count(b"HTTP/1.1 200") < 100:
            found += answer_of(connection, b"/")
        connection.sendall(b"\r\n")
        assert answer_of(connection, b"/").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_upgrade_is_an_ordinary_request(short: Running, protocol: bytes) -> None:
    """The answer is HTTP/1.1, and the connection goes on."""
    with short.connect(GET[:-2] + b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n") as connection:
        answer_of(connection, b"/")
        connection.sendall(GET)
        answer_of(connection, b"/")
        assert outliving({"it": (connection, b"")}) == []


def test_headers_after_a_body_are_bounded() -> None:
    """They were collected without end."""
    head = b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    with serving(uvloop.new_event_loop, LONG) as running:
        with running.connect(head + b"A: b\r\n\r\n") as connection:
            answer_of(connection, b"a")
        with running.connect(head) as connection:
            assert outliving({"it": (connection, b"A: " + b"b" * 1000 + b"\r\n")}) == []


@pytest.mark.parametrize("path", ["/large", "/large/close", "/stream"])
@LOOPS
def test_who_takes_nothing_is_cut_off(loops: Callable[[], asyncio.AbstractEventLoop], path: str) -> None:
    """Whether the answer is whole, its connection is closing, or there is more to come; no other time is short."""
    request = GET.replace(b"/ ", path.encode() + b" ")
    with serving(loops, LONG | {"write_seconds": 0.5}) as running, running.connect(request):
        assert wait_for(lambda: running.open == 1)
        assert wait_for(lambda: running.open == 0)
        assert wait_for(lambda: running.app.ended == [path])


@LOOPS
def test_who_takes_a_little_again_and_again_gets_all(loops: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Though it takes several times as long as one may take nothing, and as a connection may be idle."""
    with serving(loops, LONG | {"write_seconds": 0.5, "keep_alive_seconds": 0.5}) as running:
        with running.connect(GET.replace(b"/ ", b"/large ")) as connection:
            found, began = 0, time.monotonic()
            while time.monotonic() - began < 2:
                found += len(connection.recv(4096))
                time.sleep(0.05)
            assert found < SIZE
            while data := connection.recv(1 << 20):
                found += len(data)
        assert found > SIZE


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([*command, "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True)
    return paths


@pytest.mark.parametrize("path", ["/", "/large", "/large/close", "/stream"])
@LOOPS
def test_tls_holds_nothing_longer(
    loops: Callable[[], asyncio.AbstractEventLoop], certificate: tuple[Path, Path], path: str
) -> None:
    """Here a connection that is to close waits for its peer's farewell as well."""
    with serving(loops, SHORT, ssl_certfile=str(certificate[0]), ssl_keyfile=str(certificate[1])) as running:
        context = ssl.create_default_context(cafile=str(certificate[0]))
        context.check_hostname = False
        with context.wrap_socket(running.connect()) as connection:
            connection.sendall(GET.replace(b"/ ", path.encode() + b" "))
            assert wait_for(lambda: running.app.ended == [path])
            assert wait_for(lambda: running.open == 0)
            process = psutil.Process()
            peer = connection.getsockname()
            assert wait_for(lambda: all(one.raddr != peer for one in process.net_connections("tcp")))


def test_the_application_s_own_limit_on_bodies_answers_first() -> None:
    """408 is a better end than a closed connection."""
    *_, seconds = BodyLimit.__init__.__defaults__ or ()
    assert seconds < ConnectionLimits(1024, 75, 30).body_seconds
    assert Settings().keep_alive > 60  # the usual load balancers' idle time, who would send on a closing connection
