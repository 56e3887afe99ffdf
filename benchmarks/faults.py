"""What callers see of a fault, and which alert fires, after how long: the table of docs/operations.md.

    python -m benchmarks.faults [NAME ...] [--model DIR | --fake] [--faster 10]

Every fault befalls a real server with a model, scraped by a real Prometheus (it must be installed) as often as
docker/prometheus/prometheus.yml says, under the rules of docker/prometheus/rules. Those that page are tried in their
own time. The tickets' rules look back on many minutes: under them Prometheus runs `--faster` times as fast, scrapes,
evaluations and durations alike, and the times printed are multiplied again. Three callers ask all the time.

With --fake the engine has no model, and starts sooner: for faults that are not the engine's, on a busy machine.

A line a fault, as JSON: `callers`, what became of their requests since the fault; `firing`, alerts in the order in
which they fired, with the seconds since the fault; `notes`, what else was looked at.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fault_stage import FAKE, Callers, Prometheus, Service, stage
from tests.support.fake_engine import write_bundle
from tests.support.server_process import ROOT

DEMO = ROOT / "model_store/demo"  # not benchmarks.common's: that has torch
_SETTLE_SECONDS = 20.0  # of a healthy service under Prometheus' eyes, before the fault
_WITHIN_SECONDS = 240.0


class Trial:
    """One fault: what is seen of it from `begin` on."""

    def __init__(self, prometheus: Prometheus, callers: Callers, faster: float = 1.0) -> None:
        self.prometheus, self.callers, self._faster = prometheus, callers, faster
        self.notes: dict[str, Any] = {}
        time.sleep(_SETTLE_SECONDS / faster)
        self.began = time.monotonic()

    def begin(self) -> None:
        """The fault happens now."""
        self.prometheus.firing.clear()
        self.callers.begin()
        self.began = time.monotonic()

    def wait(self, condition: Callable[[], object], within: float = _WITHIN_SECONDS, note: str = "") -> None:
        """Until it is true, or some seconds have passed since the fault; notes when, or `never`."""
        while not (true := condition()) and time.monotonic() - self.began < within:
            time.sleep(0.1)
        if note:
            seconds = round((time.monotonic() - self.began) * self._faster, 1)
            self.notes[note] = seconds if true else "never"

    def wait_firing(self, alert: str, within: float = _WITHIN_SECONDS) -> None:
        self.wait(lambda: any(name.startswith(alert) for name in self.prometheus.firing), within)

    def result(self) -> dict[str, Any]:
        firing = {name: round((at - self.began) * self._faster, 1) for name, at in self.prometheus.firing.items()}
        return {"callers": self.callers.report(), "firing": firing, "notes": self.notes, "faster": self._faster}


def engine_killed(model: str, faster: float) -> dict[str, Any]:
    """The engine's process gets SIGKILL, as from the kernel for want of memory."""
    service = Service("--model", model)
    with stage([service]) as prometheus:
        trial = Trial(prometheus, Callers(service))
        victim = service.engine
        trial.begin()
        victim.kill()
        trial.wait(lambda: service.status("/readyz") != 200, note="/readyz red")
        trial.wait(lambda: service.status("/readyz") == 200, note="serves again")
        trial.wait_firing("XLoraRestarted")
        return trial.result()


def engine_stopped(model: str, faster: float) -> dict[str, Any]:
    """The engine's process gets SIGSTOP, as a driver that never answers: until --engine-timeout, and a minute more."""
    service = Service("--model", model)
    with stage([service]) as prometheus:
        trial = Trial(prometheus, Callers(service))
        victim = service.engine
        trial.begin()
        victim.suspend()
        trial.wait(lambda: service.status("/readyz") != 200, note="/readyz red")
        trial.wait_firing("XLoraEngineStuck")
        trial.wait(lambda: service.status("/livez") != 200, note="/livez red")
        trial.wait(lambda: service.status("/readyz") == 200, note="serves again")
        time.sleep(60)
        trial.notes["fires a minute later"] = "XLoraEngineStuck (page)" in prometheus.now_firing()
        return trial.result()


def replica_killed(model: str, faster: float, vanishes: bool = False) -> dict[str, Any]:
    """One of two replicas gets SIGKILL and is not started again; its target stays, or vanishes 10 s later."""
    services = [Service("--model", model, "--wanted-replicas", "2") for _ in range(2)]
    victim, other = services
    with stage(services) as prometheus:
        trial = Trial(prometheus, Callers(victim))
        victim.restarts = False
        trial.begin()
        victim.running.process.send_signal(signal.SIGKILL)
        if vanishes:
            time.sleep(10)
            prometheus.find([other])
        trial.wait_firing("XLoraReplicasMissing")
        time.sleep(5)
        trial.notes["the other"] = other.status("/readyz")
        return trial.result()


def replica_vanished(model: str, faster: float) -> dict[str, Any]:
    """One of two replicas gets SIGKILL, and the service discovery forgets it 10 s later."""
    return replica_killed(model, faster, vanishes=True)


def crash_loop(model: str, faster: float) -> dict[str, Any]:
    """25 s after it first answers the service is killed, and 15 s later started again."""
    service = Service("--model", model, down_seconds=15)
    with stage([service]) as prometheus:
        trial = Trial(prometheus, Callers(service))
        trial.begin()
        done = threading.Event()

        def kill() -> None:
            while not done.is_set():
                process = service.running.process
                while not done.is_set() and service.status("/livez") != 200:
                    done.wait(0.2)
                done.wait(25)
                process.send_signal(signal.SIGKILL)
                process.wait()
                while not done.is_set() and service.running.process is process:
                    done.wait(0.2)

        killing = threading.Thread(target=kill)
        killing.start()
        trial.wait_firing("XLoraCrashLoop")
        done.set()
        killing.join()
        return trial.result()


def disk_full(model: str, faster: float) -> dict[str, Any]:
    """Log and cache on a file system of 1 MiB that is full, from before the start."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        log = Path(folder, "log") if mounted else Path("/dev/full")
        try:
            if mounted:
                Path(folder, "filler").write_bytes(b"x" * (1 << 20))
            with log.open("wb") as full:
                service = Service("--model", model, "--native-cache", f"{folder}/cache", stdout=full, stderr=full)
                with stage([service]) as prometheus:
                    trial = Trial(prometheus, Callers(service))
                    trial.begin()
                    time.sleep(90)
                    trial.notes["a real file system"] = mounted
                    return trial.result()
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=False)


def descriptors_gone(model: str, faster: float) -> dict[str, Any]:
    """300 connections that say half a head, and again when they are closed, against `ulimit -n` 256."""
    service = Service("--model", model, limit=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    with stage([service]) as prometheus:
        trial = Trial(prometheus, Callers(service))
        trial.begin()
        held: list[socket.socket] = []
        done = threading.Event()

        def hold() -> None:
            while not done.wait(0.2):
                held[:] = [one for one in held if not _is_closed(one)]
                while len(held) < 300 and (one := _half_a_head(service.port)) is not None:
                    held.append(one)

        holding = threading.Thread(target=hold)
        holding.start()
        trial.wait_firing("XLoraDescriptorsLow")
        trial.wait_firing("XLoraEngineDown", within=200)
        done.set()
        holding.join()
        for one in held:
            one.close()
        return trial.result()


def _half_a_head(port: int) -> socket.socket | None:
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=1)
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        connection.setblocking(False)
    except OSError:
        return None
    return connection


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def kv_pool_full(model: str, faster: float) -> dict[str, Any]:
    """Long answers of 12 callers in a pool that has room for a quarter of them."""
    service = Service("--model", model, "--max-model-len", "1024", "--kv-memory", "16MiB")
    body = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with stage([service], faster) as prometheus:
        trial = Trial(prometheus, Callers(service, body, threads=12), faster)
        trial.begin()
        trial.wait(lambda: service.running.metric("xlora_preemptions_total") > 0, note="first set back")
        trial.wait_firing("XLoraKVPoolFull", within=3 * 600 / faster)
        return trial.result()


def drift(model: str, faster: float) -> dict[str, Any]:
    """All traffic becomes of one kind, which the bundle's profile has as one of several."""
    service = Service("--model", model)
    body = {"prompt": "Compute 48 + 87.\n", "max_tokens": 32, "stream": True}
    with stage([service], faster) as prometheus:
        trial = Trial(prometheus, Callers(service, body), faster)
        trial.begin()
        trial.wait_firing("XLoraGateDrift", within=3 * 1800 / faster)
        return trial.result()


FAULTS = {
    fault.__name__.replace("_", "-"): fault
    for fault in (
        *(engine_killed, engine_stopped, replica_killed, replica_vanished, crash_loop),
        *(disk_full, descriptors_gone, kv_pool_full, drift),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What callers see of a fault, and which alert fires.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FAULTS)}; default: all")
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--fake", action="store_true", help="an engine without a model")
    parser.add_argument("--faster", type=float, default=10.0, help="how much faster Prometheus is for tickets")
    arguments = parser.parse_args()
    model = str(write_bundle(Path(FAKE))) if arguments.fake else arguments.model
    for name in arguments.names or FAULTS:
        if name not in FAULTS:
            parser.error(f"no fault {name}: {', '.join(FAULTS)}")
        print(json.dumps({"fault": name, "model": model, **FAULTS[name](model, arguments.faster)}), flush=True)


if __name__ == "__main__":
    main()
