"""Two replicas on three Ray nodes of this machine, through Ray's proxy: what a client sees, also when things die.

One cluster for the module; the tests that kill come last and leave a whole one behind. The head has the proxy and no
replica, so that a worker node can be killed without the connections.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.bundles import make_bundle
from tests.support.server_process import ROOT, free_port, server
from tests.support.waiting import wait_for

pytest.importorskip("ray", reason="Ray is not installed (pip install 'xlora-service[ray]')")
pytestmark = pytest.mark.slow  # minutes on two cores, and Ray's own time limits want them idle

KEY = "a-key-of-the-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SEATS, QUEUE = 4, 8
MARK = "CLUSTER_TEST_MARK"
SLOW_SECONDS = 300.0  # for what takes seconds on a quiet machine


class Cluster:
    """The nodes, and the address of the proxy."""

    def __init__(self, nodes: subprocess.Popen[str], port: int, mark: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._nodes = nodes
        self._mark = mark

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={**HEADERS, **headers}, timeout=60)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={**HEADERS, **headers}, timeout=60)

    def metric(self, name: str) -> dict[str, float]:
        """One series without further labels, by replica."""
        found = re.findall(rf'^{name}{{replica="(\w+)"}} (\S+)$', self.get("/metrics").text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}

    def engines(self) -> list[psutil.Process]:
        """The engines' processes of this cluster, and of no other."""
        return [one for one in psutil.process_iter() if self._is_engine(one)]

    def kill_node(self) -> None:
        """One worker; a new one comes in its place."""
        assert self._nodes.stdin is not None
        self._nodes.stdin.write("\n")
        self._nodes.stdin.flush()

    def _is_engine(self, process: psutil.Process) -> bool:
        try:
            return "service.engine.worker" in process.cmdline() and process.environ().get(MARK) == self._mark
        except psutil.Error:
            return False


def until(true: Callable[[], bool]) -> None:
    assert wait_for(true, SLOW_SECONDS)


def whole(cluster: Cluster) -> bool:
    """Two replicas answer a scrape."""
    answer = cluster.get("/metrics")
    return answer.status_code == 200 and len(re.findall(r"^xlora_info{", answer.text, re.MULTILINE)) == 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for streams that take longer than it takes to kill something."""
    room = {"max_position_embeddings": 4096}
    folder = tmp_path_factory.mktemp("cluster") / "tiny"
    return make_bundle(folder, xlora={"layerwise_scalings": True}, base_config=room)


@pytest.fixture(scope="module")
def cluster(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    mark = secrets.token_hex(8)
    variables = {
        MARK: mark,
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port()),  # all nodes are one machine: only the head has ours
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "3",
    }
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    flags = ["--model", str(bundle), "--replicas", "2", "--threads", "1", "--kv-memory", "32MiB", "--block-size", "8"]
    flags += ["--max-num-seqs", str(SEATS), "--max-queued-requests", str(QUEUE), "--api-key-file", str(keys)]
    command = [sys.executable, "-m", "tests.support.ray_nodes"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, text=True, **pipes) as nodes:
        try:
            assert nodes.stdout is not None
            line = next(line for line in nodes.stdout if line.startswith("{"))
            flags += ["--address", json.loads(line)["address"]]
            with server(*flags, command="cluster", ready_seconds=SLOW_SECONDS, env=variables) as running:
                found = Cluster(nodes, running.port, mark)
                until(lambda: whole(found))
                yield found
            assert running.process.returncode == 0
        finally:
            assert nodes.stdin is not None
            nodes.stdin.close()


def prompt(number: int) -> list[int]:
    """48 tokens, six blocks, that no other number begins with."""
    return [2 + number, *range(10, 57)]


async def events(client: httpx.AsyncClient, cluster: Cluster, body: dict[str, Any]) -> AsyncIterator[Any]:
    """The data of every event; the last is the text [DONE] or an error. An error instead of a stream comes alone."""
    request = {"ignore_eos": True, "temperature": 0, **body, "stream": True}
    async with client.stream("POST", f"{cluster.url}/generate", json=request, headers=HEADERS) as answer:
        if answer.status_code != 200:
            yield json.loads(await answer.aread())
            return
        async for line in answer.aiter_lines():
            if line:
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)


def load_of(cluster: Cluster) -> dict[str, float]:
    """Requests in each replica, running and waiting."""
    running, waiting = (cluster.metric(f"xlora_requests_{state}") for state in ("running", "waiting"))
    return {replica: running[replica] + waiting[replica] for replica in running}


def tokens_of(streamed: list[Any]) -> list[int]:
    return [token for event in streamed if "token_ids" in event for token in event["token_ids"]]


def test_every_endpoint_answers_through_the_proxy(cluster: Cluster) -> None:
    paths = ("/", "/web/app.js", "/docs", "/openapi.json", "/livez", "/readyz", "/health", "/info", "/v1/models")
    assert {path: cluster.get(path).status_code for path in paths} == dict.fromkeys(paths, 200)
    name = cluster.get("/info").json()["model"]
    chat = {"model": name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    assert cluster.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 2}).status_code == 200
    assert cluster.post("/v1/chat/completions", chat).status_code in (200, 400)  # the bundle may have no template
    assert cluster.post("/scalings", {"prompt": "a"}).status_code == 200
    assert cluster.post("/detokenize", {"token_ids": [5]}).status_code == 200


def test_keys_ids_and_errors_are_those_of_the_service(cluster: Cluster) -> None:
    refused = cluster.post("/generate", {"prompt": "a"}, Authorization="Bearer wrong")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    wrong = cluster.post("/generate", {"prompt": "a", "speed": 9}, **{"X-Request-Id": "mine"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "speed")
    assert wrong.headers.get_list("x-request-id") == ["mine"]
    assert cluster.post("/generate", {"prompt": "x" * (5 << 20)}).status_code == 413


def test_tokens_come_one_by_one_and_are_those_of_the_whole_answer(cluster: Cluster) -> None:
    async def stream() -> list[Any]:
        async with httpx.AsyncClient(timeout=60) as client:
            return [event async for event in events(client, cluster, {"prompt": prompt(0), "max_tokens": 20})]

    streamed = asyncio.run(stream())
    body = {"prompt": prompt(0), "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    assert tokens_of(streamed) == cluster.post("/generate", body).json()["outputs"][0]["token_ids"]
    assert streamed[-1] == "[DONE]"


def test_a_client_that_leaves_ends_its_generation(cluster: Cluster) -> None:
    """Events come while it runs: three are read of the 900, and the engine stops far from the end."""
    before = sum(cluster.metric("xlora_generated_tokens_total").values())

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            stream = events(client, cluster, {"prompt": prompt(1), "max_tokens": 900})
            for _ in range(3):
                await anext(stream)
            await stream.aclose()

    asyncio.run(leave())
    until(lambda: not any(cluster.metric("xlora_requests_running").values()))
    assert sum(cluster.metric("xlora_generated_tokens_total").values()) - before < 600


def test_prompts_that_begin_alike_find_their_keys_and_values(cluster: Cluster) -> None:
    """Twelve beginnings, three requests each: only the first of each computes its prompt, and both replicas work.

    With a session of its own for each request (a random replica) beginnings are computed on both.
    """

    def cached(first: int, **headers: Callable[[], str]) -> int:
        made = {name: make() for name, make in headers.items()}
        answer = cluster.post("/generate", {"prompt": prompt(first), "max_tokens": 1}, **made)
        return int(answer.json()["usage"]["cached_tokens"])

    begun = cluster.metric("xlora_generated_tokens_total")
    alike = [cached(number) for number in range(20, 32) for _ in range(3)]
    worked = cluster.metric("xlora_generated_tokens_total")
    assert alike == [0, 40, 40] * 12
    assert all(worked[replica] > begun[replica] for replica in worked)
    anywhere = {"X-Session-Id": lambda: secrets.token_hex(8)}
    assert sum(cached(number, **anywhere) for number in range(40, 52) for _ in range(3)) < sum(alike)


def test_every_replica_is_in_every_scrape(cluster: Cluster, promtool: str) -> None:
    text = cluster.get("/metrics").text
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(cluster.metric("xlora_requests_running")) == 2
    assert len(re.findall(r"^# TYPE xlora_requests_running ", text, re.MULTILINE)) == 1


def crowd(cluster: Cluster, number: int) -> list[httpx.Response]:
    """The answers to so many requests at once."""

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=120, limits=limits, headers=HEADERS) as client:
            bodies = [{"prompt": prompt(60 + one), "max_tokens": 60, "ignore_eos": True} for one in range(number)]
            return await asyncio.gather(*(client.post(f"{cluster.url}/generate", json=body) for body in bodies))

    return asyncio.run(ask())


def test_a_burst_that_the_replicas_have_room_for_is_served(cluster: Cluster) -> None:
    """More at once than may wait for one replica; fewer than both have seats and waiting places for, by any split."""
    for _ in range(3):
        assert {answer.status_code for answer in crowd(cluster, SEATS + QUEUE)} == {200}


def test_too_many_requests_are_refused_in_our_shape(cluster: Cluster) -> None:
    answers = crowd(cluster, 100)
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429}
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
    assert len(answers) - len(refused) >= SEATS + QUEUE


def test_a_replica_whose_engine_died_is_replaced(cluster: Cluster) -> None:
    before = set(cluster.metric("xlora_requests_running"))
    victim = cluster.engines()[0]
    victim.kill()
    until(lambda: whole(cluster) and len(set(cluster.metric("xlora_requests_running")) - before) == 1)
    assert len(cluster.engines()) == 2
    for number in range(8):
        assert cluster.post("/generate", {"prompt": prompt(200 + number), "max_tokens": 1}).status_code == 200


def test_a_killed_node_breaks_its_own_streams_only(cluster: Cluster) -> None:
    """Each of those ends with an error, the others get all their tokens, and the replica is replaced.

    No more streams than one replica has room for, whatever their split: none may be refused.
    """
    numbers, tokens, compared = range(100, 100 + SEATS + QUEUE), 3000, 40
    before = set(cluster.metric("xlora_requests_running"))

    async def one(client: httpx.AsyncClient, number: int, streamed: list[Any]) -> None:
        async for event in events(client, cluster, {"prompt": prompt(number), "max_tokens": tokens}):
            streamed.append(event)

    async def load() -> tuple[list[list[Any]], dict[str, float]]:
        """What each stream got, and how many were in each replica just before."""
        async with httpx.AsyncClient(timeout=SLOW_SECONDS, limits=httpx.Limits(max_connections=50)) as client:
            answers: list[list[Any]] = [[] for _ in numbers]
            streams = [asyncio.create_task(one(client, *pair)) for pair in zip(numbers, answers, strict=True)]
            while sum(bool(tokens_of(streamed)) for streamed in answers) < 2 * SEATS:  # all seats are taken
                await asyncio.sleep(0.01)
            held = await asyncio.to_thread(load_of, cluster)
            cluster.kill_node()
            await asyncio.gather(*streams)
            return answers, held

    answers, held = asyncio.run(load())
    broken = [streamed for streamed in answers if streamed[-1] != "[DONE]"]
    assert {streamed[-1]["error"]["code"] for streamed in broken} == {"replica_lost"}
    until(lambda: whole(cluster) and len(set(cluster.metric("xlora_requests_running")) - before) == 1)
    [lost] = before - set(cluster.metric("xlora_requests_running"))
    assert 0 < len(broken) <= held[lost] < len(answers)
    assert any(tokens_of(streamed) for streamed in broken)
    for number, streamed in zip(numbers, answers, strict=True):
        body = {"prompt": prompt(number), "max_tokens": compared, "temperature": 0, "ignore_eos": True}
        expected = cluster.post("/generate", body).json()["outputs"][0]["token_ids"]
        got = tokens_of(streamed)
        assert got[:compared] == expected[: len(got)]
        assert streamed in broken or len(got) == tokens
