"""What docs/operations.md says the server prints: start-up errors, alerts, metrics, log lines, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.support.server_process import ROOT, server
from tests.support.waiting import wait_for

TEXT = (ROOT / "docs/operations.md").read_text()
GPU_METRICS = re.compile(r"xlora_gpu_")  # only where there is a GPU
# Messages of the table that nothing here can cause: they need a container's limit, a GPU, a full /dev/shm, another
# machine's files or a kernel that kills. Their own tests are where they are raised.
NOT_CAUSED = ("sha256", "the weights need", "attention runs on", "No space", "no native kernels", "the engine is lost")
CAUSES = {  # flags of a start that cannot succeed; tests below cause a taken port and an unknown variable
    "a model that is not there": ("--model", "/nowhere/at/all"),
    "no GPU": ("--device", "cuda"),
    "too long a context": ("--max-model-len", "9000"),
    "too little KV memory": ("--kv-memory", "4MiB", "--max-model-len", "8192"),
    "no key file": ("--api-key-file", "/nowhere/keys"),
}


def section(heading: str) -> str:
    return TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def messages() -> list[str]:
    """The message of each row of the first table under Troubleshooting."""
    table = section("Troubleshooting").split("| a caller sees |")[0]
    return re.findall(r"^\| [^`|]*`([^`]+)`", table, re.MULTILINE)


def started(*flags: str, command: str = "serve", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", command, *flags],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def assert_in_the_table(done: subprocess.CompletedProcess[str]) -> None:
    """One message of the table is what it has printed; names and numbers in it are examples."""
    assert done.returncode == 1
    found = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert found, done.stderr
    assert any(likeness(message).search(found[0]) for message in messages()), f"not in the table: {found[0]}"


def likeness(message: str) -> re.Pattern[str]:
    """The message with any number, path, address, variable or left out part."""
    varying = re.compile(r"\.\.\.|/models/mine|XLORA_\w+|\d+(?:\.\d+)*(?::\d+)?")
    parts = varying.split(message)
    return re.compile(r".*?".join(map(re.escape, parts)))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_taken_port_is_in_the_table(taken_port: int) -> None:
    assert_in_the_table(started("--port", str(taken_port)))


@pytest.mark.slow
@pytest.mark.parametrize("flags", CAUSES.values(), ids=CAUSES)
def test_what_stops_a_start_is_in_the_table(flags: tuple[str, ...]) -> None:
    assert_in_the_table(started("--port", "0", *flags))


def test_an_unknown_variable_is_in_the_table() -> None:
    assert_in_the_table(started("--port", "0", XLORA_MAX_NUM_SEQ="3"))


def test_every_message_is_caused_or_known_not_to_be() -> None:
    others = [message for message in messages() if not any(start in message for start in NOT_CAUSED)]
    assert len(messages()) - len(others) == len(NOT_CAUSED)
    assert len(others) == len(CAUSES) + 2, others


def test_likeness_is_about_words() -> None:
    """Negative control."""
    assert likeness("cannot listen on 127.0.0.1:8000: in use").search("error: cannot listen on 127.0.0.1:41: in use")
    assert not likeness("cannot listen on 127.0.0.1:8000: in use").search("error: cannot bind 127.0.0.1:8000: in use")


def test_the_alerts_are_those_of_the_rules() -> None:
    rules = yaml.safe_load((ROOT / "docker/prometheus/rules/alerts.yml").read_text())
    known = {(rule["alert"], rule["labels"]["severity"]) for group in rules["groups"] for rule in group["rules"]}
    rows = re.findall(r"^\| `(XLora\w+)` \((\w+)\) \|", section("Monitoring"), re.MULTILINE)
    assert set(rows) == known


def test_usage_ends_with_the_code_of_the_table() -> None:
    assert started("--no-such-flag").returncode == stated_code("wrong usage")


def stated_code(meaning: str) -> int:
    return int(re.findall(rf"^\| (\d+) \| {meaning}", section("Exit codes"), re.MULTILINE)[0])


@contextmanager
def logged_server(path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    flags = ("--threads", "1", "--log-format", "json", "--log-level", "info")
    with path.open("wb") as stderr, server(*flags, stderr=stderr, stdout=stderr) as running:
        assert running.post("/generate", {"prompt": "Compute 48 + 87.", "max_tokens": 3})[0] == 200
        names = set(re.findall(r"^(?:# HELP )?(xlora_\w+)", running.get("/metrics")[1].decode(), re.MULTILINE))
        wanted = set(re.findall(r"`(xlora_[a-z0-9_]+)", section("Monitoring").split("The most useful metrics")[1]))
        assert {name for name in wanted - names if not GPU_METRICS.match(name)} == set()
        yield running.port, running.process


@pytest.mark.slow
def test_a_log_line_metrics_and_the_code_of_a_stop(tmp_path: Path) -> None:
    """One server for all three: it is a start of seconds."""
    with logged_server(tmp_path / "log") as (_, process):
        lines = (tmp_path / "log").read_text
        assert wait_for(lambda: '"xlora.request"' in lines())
        record = next(json.loads(line) for line in lines().splitlines() if '"xlora.request"' in line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == stated_code("stopped by SIGTERM")
    shown = re.search(r"```json\n(.*?)\n```", section("Logs"), re.DOTALL)
    assert shown is not None
    assert list(record) == list(json.loads(shown[1]))
