"""The proxy of docker/haproxy before more replicas than a few: found by their name, checked, counted and all used."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.proxy import MISSING, Names, installed, proxy
from tests.support.server_process import free_port
from tests.support.waiting import wait_for

pytestmark = pytest.mark.skipif(not installed(), reason=MISSING)

ADDRESSES = [f"127.0.0.{2 + number}" for number in range(40)]
A_RECORD, HEADER_BYTES, QUESTION_TAIL_BYTES = 1, 12, 4


class Replica(BaseHTTPRequestHandler):
    """All of them: answers with the address that was asked."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        body = self.connection.getsockname()[0].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Resolver(socketserver.BaseRequestHandler):
    """Answers every question for addresses with all of them, as the DNS of a container network does (RFC 1035)."""

    def handle(self) -> None:
        query, reply = self.request
        end = query.index(b"\0", HEADER_BYTES) + 1 + QUESTION_TAIL_BYTES
        kind = int.from_bytes(query[end - 4 : end - 2], "big")
        found = ADDRESSES if kind == A_RECORD else []
        counts = b"\0\1" + len(found).to_bytes(2, "big") + b"\0\0\0\0"
        records = b"".join(b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(one) for one in found)
        reply.sendto(query[:2] + b"\x81\x80" + counts + query[HEADER_BYTES:end] + records, self.client_address)


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[int]:
    """Serves in a thread; yields the port."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def fetch(port: int, path: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=30) as answer:
        return str(answer.read(), "utf-8")


def test_forty_replicas_are_found_and_used(tmp_path: Path) -> None:
    """Prometheus sees each of them up, and prompts that differ reach far more than sixteen."""
    replicas, resolver = (
        ThreadingHTTPServer(("0.0.0.0", 0), Replica),
        socketserver.UDPServer(("127.0.0.1", 0), Resolver),
    )
    metrics = free_port()

    def up() -> int:
        return len(
            re.findall(r'^haproxy_server_status{proxy="replicas",.*state="UP"} 1$', fetch(metrics, "/metrics"), re.M)
        )

    with running(replicas) as port, running(resolver) as resolver_port:
        names = Names(resolver_port=resolver_port, port=port)
        with proxy(names, tmp_path, metrics) as front:
            assert wait_for(lambda: up() == len(ADDRESSES))
            asked = {fetch(front, "/generate", {"prompt": str(number) * 9}) for number in range(300)}
    assert asked <= set(ADDRESSES)
    assert len(asked) > 32
