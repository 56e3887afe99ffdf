"""What a trial of faults happens on: services that are started again when they end, a real Prometheus with the real
rules, and callers who note what becomes of their requests.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support.server_process import ROOT, Server, engine_process, free_port

SCRAPE_SECONDS, EVALUATION_SECONDS = 5.0, 15.0  # docker/prometheus/prometheus.yml
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600}
FAKE = str(Path(tempfile.gettempdir(), "xlora-fake-bundle"))  # as a model: the engine without one, which starts soon
_POLL_SECONDS = 0.2
_CALL_SECONDS = 300.0  # a caller's patience
_QUESTION = {"prompt": "Once upon a time", "max_tokens": 48, "ignore_eos": True, "stream": True}


class Service:
    """A server on a port of its own, which is started again when it ends, as a container's `restart` does."""

    def __init__(self, *flags: str, down_seconds: float = 1.0, limit: Callable[[], None] | None = None, **popen: Any):
        port = free_port()
        self.port = port
        self.down_seconds = down_seconds
        self.restarts = True
        module = "service" if FAKE not in flags else "tests.support.fake_server"
        self._command = [sys.executable, "-m", module, "serve", "--port", str(port), "--threads", "1", *flags]
        self._popen = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "preexec_fn": limit, **popen}
        self._closed = threading.Event()
        self.running = self._start()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _start(self) -> Server:
        variables = os.environ | {"HF_HUB_OFFLINE": "1"}
        return Server(self.port, subprocess.Popen(self._command, cwd=ROOT, env=variables, **self._popen))

    def _keep(self) -> None:
        while not self._closed.is_set():
            self.running.process.wait()
            if not self.restarts or self._closed.wait(self.down_seconds):
                return
            self.running = self._start()

    def status(self, path: str) -> int:
        """Of a GET; 0 where nobody answers."""
        try:
            return self.running.get(path)[0]
        except OSError:
            return 0

    def wait_ready(self) -> None:
        while self.status("/readyz") != 200:
            time.sleep(_POLL_SECONDS)

    @property
    def engine(self) -> psutil.Process:
        return engine_process(self.running)

    def close(self) -> None:
        self._closed.set()
        self.running.process.send_signal(signal.SIGKILL)
        self.running.process.wait()


class Prometheus:
    """The rules of docker/prometheus over some services; `faster` than life where its durations take minutes."""

    def __init__(self, folder: Path, services: list[Service], faster: float) -> None:
        self.port = free_port()
        self.firing: dict[str, float] = {}  # when each alert was first seen to fire, by name
        self._targets = folder / "targets.json"
        self.find(services)
        rules = folder / "rules"
        rules.mkdir()
        for path in (ROOT / "docker/prometheus/rules").glob("*.yml"):
            (rules / path.name).write_text(_faster(path.read_text(), faster))
        scrape = {"job_name": "xlora", "file_sd_configs": [{"files": [str(self._targets)]}]}
        times = {
            "scrape_interval": f"{1000 * SCRAPE_SECONDS / faster:.0f}ms",
            "scrape_timeout": f"{1000 * SCRAPE_SECONDS / faster:.0f}ms",
            "evaluation_interval": f"{1000 * EVALUATION_SECONDS / faster:.0f}ms",
        }
        config = {"global": times, "rule_files": [f"{rules}/*.yml"], "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command.append(f"--web.listen-address=127.0.0.1:{self.port}")
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def find(self, services: list[Service]) -> None:
        """What the service discovery finds from now on."""
        whole = [{"targets": [f"127.0.0.1:{service.port}" for service in services]}]
        fresh = self._targets.with_suffix(".new")
        fresh.write_text(json.dumps(whole))
        fresh.rename(self._targets)

    def now_firing(self) -> set[str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/alerts", timeout=10) as answer:
                alerts = json.load(answer)["data"]["alerts"]
        except OSError:
            return set()
        return {
            f"{one['labels']['alertname']} ({one['labels']['severity']})" for one in alerts if one["state"] == "firing"
        }

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            for name in self.now_firing():
                self.firing.setdefault(name, time.monotonic())

    def close(self) -> None:
        self._closed.set()
        self._process.terminate()
        self._process.wait()


def _faster(rules: str, factor: float) -> str:
    """Rules whose durations are shorter: ranges in brackets, and `for`."""

    def shorter(match: re.Match[str]) -> str:
        return f"{match[1]}{1000 * int(match[2]) * _UNIT_SECONDS[match[3]] / factor:.0f}ms"

    return re.sub(r"(\[|for: )(\d+)([smh])", shorter, rules)


class Callers:
    """Threads that ask one service after another thing, and note what each request came to, and after how long."""

    def __init__(self, service: Service, body: dict[str, Any] = _QUESTION, threads: int = 3) -> None:
        self._service, self._body = service, body
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._seen: dict[str, list[float]] = defaultdict(list)  # seconds, by what became of a request
        self._since = time.monotonic()
        for _ in range(threads):
            threading.Thread(target=self._call, daemon=True).start()

    def begin(self) -> None:
        """Forgets what was before the fault."""
        with self._lock:
            self._seen.clear()
            self._since = time.monotonic()

    def report(self) -> str:
        """Counts and the longest time of each kind, the most frequent first."""
        with self._lock:
            counts = Counter({what: len(times) for what, times in self._seen.items()})
            return ", ".join(
                f"{count} {what} (up to {max(self._seen[what]):.1f} s)" for what, count in counts.most_common()
            )

    def close(self) -> None:
        self._closed.set()

    def _call(self) -> None:
        while not self._closed.is_set():
            began = time.monotonic()
            what = self._ask()
            with self._lock:
                if time.monotonic() > self._since:
                    self._seen[what].append(time.monotonic() - began)
            time.sleep(0.5 if what == "no connection" else 0.1)

    def _ask(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._service.port, timeout=_CALL_SECONDS)
        try:
            connection.request("POST", "/generate", json.dumps(self._body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return "no connection" if isinstance(error, ConnectionRefusedError) else "broken before an answer"
        try:
            body = answer.read()
        except (OSError, http.client.HTTPException):
            return "stream broken"
        finally:
            connection.close()
        if answer.status == 200 and body.rstrip().endswith(b"[DONE]"):
            return "answered"
        code = re.search(rb'"code":"(\w+)"', body)
        where = "stream ended" if answer.status == 200 else str(answer.status)
        return f"{where} {code[1].decode()}" if code else where


@contextmanager
def stage(services: list[Service], faster: float = 1.0) -> Iterator[Prometheus]:
    """Everything running and ready, and ended afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        prometheus = None
        try:
            for service in services:
                service.wait_ready()
            prometheus = Prometheus(Path(folder), services, faster)
            yield prometheus
        finally:
            for closing in (*services, prometheus):
                if closing is not None:
                    closing.close()
