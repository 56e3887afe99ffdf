"""The proxy of docker/compose.replicas.yaml as a process on this machine, before replicas on ports of this machine.

It runs the shipped configuration; only the addresses that the container has are replaced.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.server_process import free_port

_DOCKER = Path(__file__).parents[2] / "docker"
CONFIGURATION = _DOCKER / "haproxy/haproxy.cfg"
MISSING = "haproxy is not installed (Debian: apt-get install haproxy)"
_START_SECONDS = 10.0


def installed() -> bool:
    return shutil.which("haproxy") is not None


def drain_delay() -> float:
    """What compose.replicas.yaml gives its containers, in seconds."""
    found = re.search(r"^ +XLORA_DRAIN_DELAY: (\d+)", (_DOCKER / "compose.replicas.yaml").read_text("utf-8"), re.M)
    assert found is not None
    return float(found[1])


@dataclass(frozen=True)
class Names:
    """Replicas that the proxy finds by their name."""

    resolver_port: int  # on 127.0.0.1, who answers for the name
    port: int  # of every address


def render(port: int, replicas: Sequence[int] | Names, metrics_port: int) -> str:
    """The shipped configuration, listening on `port`, with the replicas at these ports or behind a name."""
    addresses = {r"bind :8000$": f"bind 127.0.0.1:{port}", r"bind :8405$": f"bind 127.0.0.1:{metrics_port}"}
    if isinstance(replicas, Names):
        addresses[r"parse-resolv-conf$"] = f"nameserver stub 127.0.0.1:{replicas.resolver_port}"
        addresses[r"(server-template \w+ \d+) xlora:8000"] = rf"\1 xlora:{replicas.port}"
    else:
        servers = [f"server replica{one} 127.0.0.1:{one}" for one in replicas]
        addresses[r"server-template .*$"] = "\n    ".join(servers)
    text = CONFIGURATION.read_text("utf-8")
    for shipped, here in addresses.items():
        text, found = re.subn(rf"^    {shipped}", f"    {here}", text, flags=re.M)
        assert found == 1, shipped
    return text


@contextmanager
def proxy(replicas: Sequence[int] | Names, folder: Path, metrics_port: int | None = None) -> Iterator[int]:
    """Runs the proxy until the block ends; yields its port once it listens."""
    port = free_port()
    path = folder / f"haproxy-{port}.cfg"
    path.write_text(render(port, replicas, metrics_port or free_port()))
    with (folder / f"haproxy-{port}.log").open("wb") as log:
        process = subprocess.Popen(["haproxy", "-db", "-f", str(path)], stdout=log, stderr=log)
        try:
            _wait_for(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"haproxy does not listen (exit code {process.poll()})")
