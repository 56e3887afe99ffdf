"""An upgrade under long streams, with the numbers of compose or of Kubernetes: how many requests does it cost?

    python -m benchmarks.rolling_upgrade [--platform compose|kubernetes] [--streams 12] [--seconds 60] [--fake]

Two replicas of the real server are replaced by two others while streams of --seconds and short requests go on. What
the containers, or pods, would be are processes here, and the times are those of docker/: what a replica is started
with, and how long after SIGTERM it is killed. --drain-seconds and --grace-seconds try others. With --fake the engine is
that of the tests, at ten tokens a second: what stops, drains and is killed is the same, and costs next to no compute.

    compose      the shipped HAProxy before them; as docs/operations.md has it: new ones beside, then the old ones stop
    kubernetes   callers take any endpoint, without retries; one goes from the list only when its readiness probe has
                 failed (a cluster takes it out as it deletes the pod, which is sooner). One by one, a new one first
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import DEMO, emit
from tests.support.fake_engine import write_bundle
from tests.support.proxy import drain_delay, proxy
from tests.support.server_process import ROOT, free_port
from tests.support.waiting import wait_for

READY_SECONDS = 300.0
FAILURES = (OSError, HTTPException)


@dataclass(frozen=True)
class Numbers:
    """How a platform starts and stops a replica, in seconds."""

    drain_delay: float
    drain: float
    grace: float  # from SIGTERM to SIGKILL
    probe_period: float
    probe_failures: int


def compose_numbers() -> Numbers:
    """As docker/compose.yaml and its overlay of replicas have them."""
    text = (ROOT / "docker/compose.yaml").read_text()
    drain, grace = (re.findall(rf"{name}:-(\d+)", text)[0] for name in ("DRAIN_SECONDS", "STOP_GRACE_PERIOD"))
    return Numbers(drain_delay(), float(drain), float(grace), 1, 2)


def kubernetes_numbers() -> Numbers:
    """As docker/kubernetes/base/deployment.yaml has them."""
    deployment = yaml.safe_load((ROOT / "docker/kubernetes/base/deployment.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    given, probe = container["args"], container["readinessProbe"]
    delay, drain = (float(given[given.index(flag) + 1]) for flag in ("--drain-delay", "--drain-seconds"))
    grace = float(pod["terminationGracePeriodSeconds"])
    return Numbers(delay, drain, grace, probe["periodSeconds"], probe["failureThreshold"])


@dataclass(frozen=True)
class Kind:
    """The server that is run, and what it serves."""

    module: str
    model: Path


class Replica:
    """One server, as a container or pod would run it."""

    def __init__(self, numbers: Numbers, kind: Kind, port: int) -> None:
        self.port, self._grace = port, numbers.grace
        self.killed = False
        flags = ["--model", str(kind.model), "--port", str(port), "--threads", "1", "--log-level", "error"]
        flags += ["--drain-delay", str(numbers.drain_delay), "--drain-seconds", str(numbers.drain)]
        command = [sys.executable, "-m", kind.module, "serve", *flags]
        self._process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"FAKE_LOADER": "load_paced_engine"})

    def is_ready(self) -> bool:
        """What a probe sees."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2):
                return True
        except FAILURES:
            return False

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when the grace period is over."""
        self._process.terminate()
        try:
            self._process.wait(self._grace)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """At once."""
        self.killed = True
        self._process.kill()
        self._process.wait()


class Endpoints:
    """The ports that callers may take: those whose readiness probe passes, as a cluster keeps them."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self._failures: dict[Replica, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._probe, daemon=True)
        self._thread.start()

    def add(self, replica: Replica) -> None:
        """A pod that is there, ready or not."""
        self._failures[replica] = self._numbers.probe_failures

    def port(self) -> int:
        """Any that is ready."""
        return random.choice([one.port for one in list(self._failures) if self.takes(one)])

    def all_in(self) -> bool:
        """Whether every pod that is there takes requests."""
        return all(map(self.takes, list(self._failures)))

    def takes(self, replica: Replica) -> bool:
        """Whether this one takes requests."""
        return self._failures[replica] < self._numbers.probe_failures

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _probe(self) -> None:
        while not self._stop.wait(self._numbers.probe_period):
            for replica in list(self._failures):
                self._failures[replica] = 0 if replica.is_ready() else self._failures[replica] + 1


@dataclass
class Load:
    """Long streams and short requests, one after another in threads, until told to stop."""

    port: Callable[[], int]
    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter)
    durations: list[float] = field(default_factory=list)

    @contextmanager
    def running(self, streams: int, callers: int) -> Iterator[None]:
        """What has begun comes to its end."""
        stop = threading.Event()
        jobs = [(self._stream, number) for number in range(streams)] + [
            (self._short, number) for number in range(callers)
        ]
        threads = [threading.Thread(target=self._repeat, args=(stop, *job)) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _repeat(self, stop: threading.Event, job: Callable[[int], str], number: int) -> None:
        while not stop.is_set():
            try:
                self.outcomes[job(number)] += 1
            except FAILURES as error:
                self.outcomes[f"lost {job.__name__.strip('_')}"] += 1
                print(f"  lost: {job.__name__.strip('_')} {error!r}", file=sys.stderr)
                time.sleep(0.2)

    def _stream(self, number: int) -> str:
        """One that runs until its own time limit."""
        began = time.monotonic()
        body = {"prompt": f"Compute {number + 20} + 87.\n", "ignore_eos": True, "stream": True, "timeout": self.seconds}
        with self._post(body) as answer:
            whole = answer.read().endswith(b"data: [DONE]\n\n")
        if not whole:
            raise HTTPException("the stream has no end")
        self.durations.append(time.monotonic() - began)
        return "streams"

    def _short(self, number: int) -> str:
        with self._post({"prompt": f"What is {number + 20} + 76?\n", "max_tokens": 4}) as answer:
            json.load(answer)
        time.sleep(0.2)
        return "short requests"

    def _post(self, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port()}/generate", data, {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=self.seconds + 120)


def upgrade_compose(stack: ExitStack, numbers: Numbers, kind: Kind) -> tuple[Callable[[], int], Callable[[], int]]:
    """The port of the proxy, and what replaces the replicas behind it and returns how many had to be killed."""
    ports = [free_port() for _ in range(4)]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    old = started(stack, numbers, kind, ports[:2])
    front = stack.enter_context(proxy(ports, folder))
    assert wait_for(lambda: answers(front), READY_SECONDS)

    def replace() -> int:
        started(stack, numbers, kind, ports[2:])
        time.sleep(2 * numbers.probe_period)  # the proxy has seen them
        stopping = [threading.Thread(target=one.stop) for one in old]  # docker stop, with all of them
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        return sum(one.killed for one in old)

    return lambda: front, replace


def upgrade_kubernetes(stack: ExitStack, numbers: Numbers, kind: Kind) -> tuple[Callable[[], int], Callable[[], int]]:
    """A port of the endpoints, and what rolls the deployment over and returns how many pods had to be killed."""
    endpoints = Endpoints(numbers)
    stack.callback(endpoints.close)
    old = started(stack, numbers, kind, [free_port(), free_port()])
    for one in old:
        endpoints.add(one)
    assert wait_for(endpoints.all_in, READY_SECONDS)

    def replace() -> int:
        stopping = []
        for gone in old:
            [new] = started(stack, numbers, kind, [free_port()])
            endpoints.add(new)
            assert wait_for(partial(endpoints.takes, new), READY_SECONDS)
            stopping.append(threading.Thread(target=gone.stop))
            stopping[-1].start()
        for thread in stopping:
            thread.join()
        return sum(one.killed for one in old)

    return endpoints.port, replace


def started(stack: ExitStack, numbers: Numbers, kind: Kind, ports: list[int]) -> list[Replica]:
    """Replicas that are ready; they end with the stack."""
    replicas = [Replica(numbers, kind, port) for port in ports]
    for one in replicas:
        stack.callback(one.kill)
    assert wait_for(lambda: all(one.is_ready() for one in replicas), READY_SECONDS)
    return replicas


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
            return True
    except FAILURES:
        return False


PLATFORMS = {"compose": (compose_numbers, upgrade_compose), "kubernetes": (kubernetes_numbers, upgrade_kubernetes)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=PLATFORMS, action="append", help="may be repeated; default: both")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--fake", action="store_true", help="the tests' engine in the place of a model")
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--drain-seconds", type=float, help="other than the platform's")
    parser.add_argument("--grace-seconds", type=float, help="other than the platform's")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # replicas end with it
    lost = 0
    for platform in args.platform or PLATFORMS:
        read, upgrade = PLATFORMS[platform]
        shipped = read()
        numbers = Numbers(
            shipped.drain_delay,
            shipped.drain if args.drain_seconds is None else args.drain_seconds,
            shipped.grace if args.grace_seconds is None else args.grace_seconds,
            shipped.probe_period,
            shipped.probe_failures,
        )
        with ExitStack() as stack:
            kind = Kind("service", args.model)
            if args.fake:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                kind = Kind("tests.support.fake_server", Path(write_bundle(folder)))
            port, replace = upgrade(stack, numbers, kind)
            load = Load(port, args.seconds)
            with load.running(args.streams, args.callers):
                time.sleep(args.seconds / 6)  # streams are in their beginning
                began = time.monotonic()
                killed = replace()
                took = time.monotonic() - began
        found = {name: load.outcomes[name] for name in ("streams", "short requests", "lost stream", "lost short")}
        row = {
            "benchmark": "rolling_upgrade",
            "platform": platform,
            "fake": args.fake,
            "seconds": args.seconds,
            **vars(numbers),
            **found,
        }
        row |= {"shortest_stream_seconds": min(load.durations, default=0.0), "upgrade_seconds": took, "killed": killed}
        emit(row)
        lost += found["lost stream"] + found["lost short"]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
