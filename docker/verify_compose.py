"""Brings the compose files up and checks what they promise:

    python3 docker/verify_compose.py [--replicas] [--keys] [--stand-ins]

The service becomes ready, Prometheus finds every container of it and loads every rule, under traffic every query of
the dashboard has a result, and an alert with `severity: page` reaches the pager. With --replicas two containers run
behind the proxy, and under traffic one is stopped, which may cost no request, and then killed, which may cost those
that were in it (streams of a minute through an upgrade are for benchmarks/rolling_upgrade.py). With --keys callers need
one, Prometheus has another, and theirs does not open the metrics. With --stand-ins (where images cannot be pulled)
Prometheus, Alertmanager and the proxy are Debian's packages in images of the same names, and Grafana is left out. Ends
with exit code 0, and removes what it made.

Needs Python alone, the image xlora-service (docker/verify.sh build; IMAGE names another), and docker compose, or podman
and podman-compose: docs/operations.md, "The image". COMPOSE names another command for the latter, CONTAINERS_CONF other
settings of podman's than docker/podman.conf.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

DOCKER = Path(__file__).parent
PROJECT = "xlora-verify"
PORTS = ("PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT", "GRAFANA_PORT")
PAGE = {"labels": {"alertname": "Trial", "severity": "page"}, "annotations": {"summary": "nothing is wrong"}}
# As the images of these names work, as far as the compose files use them.
STAND_INS = {
    "prometheus": 'RUN install -d -o 65534 -g 65534 /prometheus\nENTRYPOINT ["prometheus"]',
    "alertmanager": 'RUN install -d -o 65534 -g 65534 /alertmanager\nENTRYPOINT ["prometheus-alertmanager"]',
    "proxy": 'ENTRYPOINT ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]',
}
PACKAGES = {"prometheus": "prometheus", "alertmanager": "prometheus-alertmanager", "proxy": "haproxy"}
TRAFFIC = [
    {"prompt": "Compute 48 + 87.\n", "max_tokens": 24},
    {"prompt": "Which strand pairs with CTA TCT TAT?\n", "max_tokens": 24, "stream": True},
    {"prompt": "What is 88 + 76?\n", "max_tokens": 24, "return_scalings": "mean"},
]
# What resolves containers' names for podman, with CNI or netavark: without it Prometheus and the proxy find nobody.
RESOLVERS = (
    "/usr/lib/cni/dnsname",
    "/opt/cni/bin/dnsname",
    "/usr/lib/podman/aardvark-dns",
    "/usr/libexec/podman/aardvark-dns",
)
READY = "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=8)"
# compose.keys.yaml's files of keys, each with the variable that says where it lies.
KEY_FILES = {"api_keys": "API_KEY_FILE", "admin_key": "ADMIN_KEY_FILE"}
# What a request gets, by the key that it has.
KEYED = [
    ("/readyz", None, 200),
    ("/generate", None, 401),
    ("/generate", "wrong", 401),
    ("/generate", "api_keys", 200),
    ("/metrics", None, 401),
    ("/metrics", "api_keys", 401),
    ("/metrics", "admin_key", 200),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def fetch(url: str, body: Any = None, key: str | None = None) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers, or an answer breaks off."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (OSError, HTTPException):
        return 0, b""


def wait(what: str, seconds: float, check: Callable[[], object]) -> None:
    """Prints how long it took until `check` was true; ends the program where it never is."""
    began = time.monotonic()
    while not check():
        if time.monotonic() - began > seconds:
            sys.exit(f"FAILED: {what}: not so after {seconds:g} s")
        time.sleep(0.5)
    print(f"{what:<44} after {time.monotonic() - began:.1f} s", flush=True)


def succeeds(*command: str) -> bool:
    """Whether a command is there and ends with 0."""
    found = shutil.which(command[0]) is not None
    return found and subprocess.run(command, capture_output=True, check=False).returncode == 0


class Compose:
    """The compose command on the project's files, with ports of its own."""

    def __init__(self, files: list[str], variables: dict[str, str]) -> None:
        self.engine = "docker" if succeeds("docker", "info") else "podman"
        if self.engine == "podman":
            os.environ.setdefault("CONTAINERS_CONF", str(DOCKER / "podman.conf"))
        default = "docker compose" if self.engine == "docker" else "podman-compose"
        self.program = shlex.split(os.environ.get("COMPOSE", default))
        self.command = [*self.program, "-p", PROJECT]
        for file in files:
            self.command += ["-f", str(DOCKER / file)]
        self.ports = {name: free_port() for name in PORTS}
        self.environment = os.environ | {name: str(port) for name, port in self.ports.items()} | variables

    def run(self, *arguments: str, check: bool = True) -> None:
        done = subprocess.run([*self.command, *arguments], env=self.environment, capture_output=True, check=False)
        if check and done.returncode:
            sys.exit(f"FAILED: {' '.join(arguments)}\n{done.stdout.decode()}{done.stderr.decode()}")

    def url(self, port: str, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def log(self, service: str) -> bytes:
        """What a service's containers have written."""
        commands = [[self.engine, "logs", container] for container in self.containers(service)]
        return b"".join(subprocess.run(one, capture_output=True, check=True).stdout for one in commands)

    def containers(self, service: str) -> list[str]:
        """Ids of a service's running containers."""
        labels = [
            f"label=com.docker.compose.{key}={value}" for key, value in (("project", PROJECT), ("service", service))
        ]
        command = [self.engine, "ps", "-q", *(part for label in labels for part in ("--filter", label))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


class Traffic:
    """Requests one after another in four threads, until it is told to stop."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self.key = key
        self.statuses: Counter[int] = Counter()
        self._stop = threading.Event()
        self.threads = [threading.Thread(target=self._send, args=(number,)) for number in range(4)]

    def __enter__(self) -> Traffic:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self.threads:
            thread.join()

    def _send(self, number: int) -> None:
        while not self._stop.is_set():
            status, body = fetch(self.url, TRAFFIC[number % len(TRAFFIC)], self.key)
            number += 1
            self.statuses[status if status != 200 or body else 0] += 1
            time.sleep(0.1)


def query(compose: Compose, expression: str) -> list[Any]:
    path = "/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    status, body = fetch(compose.url("PROMETHEUS_PORT", path))
    found = json.loads(body or b"{}")
    if status == 400:
        sys.exit(f"FAILED: {expression}: {found['error']}")
    return found.get("data", {}).get("result", []) if status == 200 else []


def dashboard_queries(replicas: int) -> Iterator[str]:
    """Every query of the dashboards, with a value in the place of Grafana's variables."""
    boards = ["xlora.json", *(["proxy.json"] if replicas > 1 else [])]
    pending = [json.loads((DOCKER / "grafana/dashboards" / name).read_text()) for name in boards]
    while pending:
        node = pending.pop()
        pending += node.get("panels", [])
        for target in node.get("targets", []):
            if "xlora_gpu_" in target["expr"] and shutil.which("nvidia-smi") is None:
                continue
            expression = re.sub(r"\$\{?__\w*(interval|range)\w*\}?", "1m", target["expr"])
            yield re.sub(r"\$\{?\w+(:\w+)?\}?", ".*", expression)


def check_needs(compose: Compose, stand_ins: bool) -> None:
    """Everything that is missing in one message, before anything has begun."""
    if stand_ins and compose.engine == "docker":
        sys.exit("FAILED: --stand-ins is for podman, and a docker daemon answers here")
    image = os.environ.get("IMAGE", "xlora-service:latest")
    programs = ["podman", "runc", "catatonit"] if compose.engine == "podman" else []
    programs += ["buildah"] if stand_ins else []
    missing = [name for name in programs if not (shutil.which(name) or Path("/usr/libexec/podman", name).exists())]
    if compose.engine == "podman" and not any(map(os.path.exists, RESOLVERS)):
        missing.append("names of containers for podman's networks (dnsname or aardvark-dns)")
    if not succeeds(*compose.program, "version"):
        missing.append(" ".join(compose.program))
    if not succeeds(compose.engine, "image", "inspect", image):
        missing.append(f"the image {image} (docker/verify.sh build)")
    if missing:
        sys.exit(f'FAILED: not here: {", ".join(missing)}. See docs/operations.md, "The image"')


def write_keys(folder: Path) -> dict[str, str]:
    """Makes the files of keys, readable for the containers' users; only their folder keeps others out."""
    keys = {name: secrets.token_hex(24) for name in KEY_FILES}
    for name, key in keys.items():
        (folder / name).write_text(f"{key}\n")
        (folder / name).chmod(0o644)
    return keys


def build_stand_ins(services: list[str]) -> None:
    """Images of the names that the compose files use, from Debian's packages over the service's own base."""
    base = re.search(r"^ARG BASE=(.*)$", (DOCKER.parent / "Dockerfile").read_text(), re.M)
    assert base is not None
    texts = "".join((DOCKER / file).read_text() for file in ("compose.yaml", "compose.replicas.yaml"))
    images = {name: rf"(?:prom/)?{name}:[\w.-]+" for name in ("prometheus", "alertmanager")} | {
        "proxy": r"haproxy:[\w.-]+"
    }
    for service in services:
        found = re.search(images[service], texts)
        assert found is not None
        if succeeds("podman", "image", "exists", f"localhost/{found[0]}"):
            continue
        print(f"building a stand-in for {found[0]}", flush=True)
        lines = (
            f"FROM {base[1]}\nRUN apt-get update -qq && apt-get install -qq --no-install-recommends wget "
            f"{PACKAGES[service]} >/dev/null && rm -rf /etc/prometheus\n{STAND_INS[service]}\n"
        )
        command = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--pull-never", "-q"]
        subprocess.run([*command, "-t", f"localhost/{found[0]}", "-f", "-"], input=lines.encode(), check=True)


def check_monitoring(compose: Compose, replicas: int) -> None:
    """Every container is scraped and every rule is loaded."""
    wait("Prometheus is ready", 60, lambda: fetch(compose.url("PROMETHEUS_PORT", "/-/ready"))[0] == 200)
    wait(
        f"{replicas} of {replicas} containers are scraped",
        180,
        lambda: up(compose) == ["1"] * replicas,
    )
    written = sum(
        len(re.findall(r"^\s+- (?:alert|record):", file.read_text(), re.M))
        for file in (DOCKER / "prometheus/rules").glob("*.yml")
    )
    groups = json.loads(fetch(compose.url("PROMETHEUS_PORT", "/api/v1/rules"))[1])["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    if len(rules) != written:
        sys.exit(f"FAILED: {len(rules)} of {written} rules are loaded")
    print(f"{len(rules)} rules are loaded")


def check_keys(compose: Compose, keys: Mapping[str, str]) -> None:
    """Without its key nothing but the probes answers."""
    for path, name, expected in KEYED:
        body = TRAFFIC[0] if path == "/generate" else None
        status, _ = fetch(compose.url("PORT", path), body, name and keys.get(name, name))
        if status != expected:
            sys.exit(f"FAILED: {path} with {name or 'no key'}: {status} instead of {expected}")
    print(f"{len(KEYED)} requests with and without keys are answered as they should be")


def check_pager(compose: Compose) -> None:
    """Prometheus knows the Alertmanager, and what comes to that with `severity: page` is in the pager's log."""
    wait("Alertmanager is ready", 60, lambda: fetch(compose.url("ALERTMANAGER_PORT", "/-/ready"))[0] == 200)
    active = json.loads(fetch(compose.url("PROMETHEUS_PORT", "/api/v1/alertmanagers"))[1])["data"][
        "activeAlertmanagers"
    ]
    if len(active) != 1:
        sys.exit(f"FAILED: Prometheus knows {len(active)} Alertmanagers")
    fetch(compose.url("ALERTMANAGER_PORT", "/api/v2/alerts"), [PAGE])
    wait("the pager has heard of an alert", 60, lambda: b"page firing Trial" in compose.log("pager"))


def check_dashboard(compose: Compose, replicas: int) -> None:
    """Under traffic no query of the dashboards stays without a result."""
    missing = list(dashboard_queries(replicas))
    total = len(missing)

    def all_have_results() -> bool:
        missing[:] = [expression for expression in missing if not query(compose, expression)]
        return not missing

    began = time.monotonic()
    while not all_have_results():
        if time.monotonic() - began > 120:
            sys.exit("FAILED: dashboard queries without a result:\n" + "\n".join(missing))
        time.sleep(2)
    print(f"{total} dashboard queries have results")


def check_loss(compose: Compose, traffic: Traffic, command: list[str], allowed: int) -> None:
    """Takes one of two containers away under traffic: at most `allowed` requests may fail. Then brings it back."""
    before, served = traffic.statuses.copy(), traffic.statuses[200]
    victim = compose.containers("xlora")[0]
    subprocess.run([compose.engine, *command, victim], check=True, capture_output=True)
    wait(f"20 requests served after {command[0]}", 180, lambda: traffic.statuses[200] >= served + 20)
    after = traffic.statuses - before
    failed = sum(count for status, count in after.items() if status != 200)
    if failed > allowed:
        sys.exit(f"FAILED: after {command[0]} of one container: {dict(after)}")
    print(f"{command[0]} of one container: {after[200]} requests served, {failed} lost", flush=True)
    subprocess.run([compose.engine, "start", victim], check=True, capture_output=True)
    wait("it is ready again", 180, lambda: is_ready(compose, victim))
    ready = time.time()
    wait("both are scraped again", 180, lambda: up(compose, ready) == ["1", "1"])


def is_ready(compose: Compose, container: str) -> bool:
    """Whether a container of the service answers its own /readyz, whatever the proxy thinks of it."""
    return succeeds(compose.engine, "exec", container, "python", "-IS", "-c", READY)


def up(compose: Compose, since: float = 0.0) -> list[str]:
    """Whether each container that was scraped after `since` answered its last scrape."""
    series = 'up{job="xlora"}'
    return [one["value"][1] for one in query(compose, f"{series} and timestamp({series}) > {since}")]


def verify(compose: Compose, services: list[str], keys: Mapping[str, str], replicas: int) -> None:
    """All checks, on containers that are removed afterwards."""
    try:
        compose.run("up", "-d", "xlora", *services)
        wait("the service is ready", 300, lambda: fetch(compose.url("PORT", "/readyz"))[0] == 200)
        if keys:
            check_keys(compose, keys)
        check_monitoring(compose, replicas)
        check_pager(compose)
        with Traffic(compose.url("PORT", "/generate"), keys.get("api_keys")) as traffic:
            check_dashboard(compose, replicas)
            if "grafana" in services:
                wait("Grafana is ready", 90, lambda: fetch(compose.url("GRAFANA_PORT", "/api/health"))[0] == 200)
            if set(traffic.statuses) != {200}:
                sys.exit(f"FAILED: answers were {dict(traffic.statuses)}")
            print(f"{traffic.statuses[200]} requests, all answered with 200")
            if replicas > 1:
                check_loss(compose, traffic, ["stop", "-t", "615"], allowed=0)  # as compose.yaml's stop_grace_period
                check_loss(compose, traffic, ["kill"], allowed=len(traffic.threads))
    finally:
        compose.run("down", "-v", check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Brings the compose files up and checks what they promise.")
    parser.add_argument("--replicas", action="store_true", help="two containers behind the proxy")
    parser.add_argument("--keys", action="store_true", help="with compose.keys.yaml, and keys of its own")
    parser.add_argument("--stand-ins", action="store_true", help="Debian's packages in place of images")
    arguments = parser.parse_args()
    services = ["prometheus", "alertmanager", "pager", *(["proxy"] if arguments.replicas else [])]
    if not arguments.stand_ins:
        services.append("grafana")
    overlays = [f"compose.{name}.yaml" for name in ("keys", "replicas") if getattr(arguments, name)]
    with tempfile.TemporaryDirectory() as folder:
        keys = write_keys(Path(folder)) if arguments.keys else {}
        variables = {KEY_FILES[name]: f"{folder}/{name}" for name in keys}
        compose = Compose(["compose.yaml", *overlays], variables)
        check_needs(compose, arguments.stand_ins)
        if arguments.stand_ins:
            build_stand_ins([name for name in services if name in STAND_INS])
            print("Grafana is left out")
        verify(compose, services, keys, 2 if arguments.replicas else 1)
    print("compose verified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
