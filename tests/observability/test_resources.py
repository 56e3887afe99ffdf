"""Resources of real processes against psutil's own look at them; NVML's border with a stand-in for its module."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry

from service.observability.gpus import Gpus
from service.observability.resources import Reading, Resources, Usage
from tests.support.fake_engine import write_bundle
from tests.support.server_process import engine_process, server
from tests.support.waiting import wait_for


def test_the_engine_s_process_is_shown_beside_the_api_s(tmp_path: Path) -> None:
    """process_* of the client library are the API process' alone."""
    with server("--model", str(write_bundle(tmp_path)), module="tests.support.fake_server") as running:
        engine = engine_process(running)

        def shown(name: str, process: str) -> float:
            return running.metric(f'xlora_process_{name}{{process="{process}"}}')

        assert wait_for(lambda: 'process="engine"' in running.get("/metrics")[1].decode())
        assert wait_for(  # what is shown is some seconds old, and a process grows while it starts
            lambda: shown("resident_memory_bytes", "engine") == pytest.approx(engine.memory_info().rss, rel=0.3)
        )
        assert shown("start_time_seconds", "engine") == pytest.approx(engine.create_time(), abs=0.1)
        assert shown("start_time_seconds", "api") == pytest.approx(running.metric("process_start_time_seconds"), abs=2)
        assert shown("open_fds", "engine") == engine.num_fds()
        assert shown("max_fds", "api") == running.metric("process_max_fds")
        assert 0 < shown("cpu_seconds_total", "engine") <= sum(engine.cpu_times()[:2])
        assert shown("resident_memory_bytes", "helpers") > 1 << 20, "the process that renders chats"
        assert "_created" not in running.get("/metrics")[1].decode()


def test_ranks_are_told_apart_and_what_helpers_took_is_kept() -> None:
    """By their command lines; these only have those of the real ones. CPU time is a counter: it may not fall when a
    helper ends.
    """
    sleep, burn = "import time; time.sleep(600)", "sum(range(10**7)); input()"
    rank = "service.engine.tensor_parallel.rank_worker"
    lines = [[sleep, "service.engine.worker", "7"], [sleep, rank, "7", "1"], [sleep, rank, "8", "2"], [burn]]
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", *line], stdin=subprocess.PIPE))
            for line in lines
        ]
        for process in started:
            stack.callback(process.kill)
        resources = Resources()

        def usages() -> dict[str, Usage]:
            return resources._read_processes()

        assert wait_for(lambda: usages()["helpers"].cpu_seconds > psutil.Process().cpu_times().children_user + 0.05)
        roles = usages()
        assert set(roles) == {"api", "engine", "rank 1", "rank 2", "helpers"}
        assert roles["rank 2"].started_at == psutil.Process(started[2].pid).create_time()
        before = roles["helpers"].cpu_seconds
        started[3].kill()
        assert wait_for(lambda: psutil.Process(started[3].pid).status() == psutil.STATUS_ZOMBIE)
        assert usages()["helpers"].cpu_seconds >= before, "nobody has waited for it yet"
        started[3].wait()
        after = usages()["helpers"]
        assert after.cpu_seconds >= before
        assert after.resident_bytes < roles["helpers"].resident_bytes


def test_a_process_that_is_seen_before_its_program_runs() -> None:
    """Between fork and exec it looks like its parent."""
    engine = "import os, sys; input(); os.execv(sys.executable, ['python', '-c', 'input()', 'service.engine.worker'])"
    api = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen([sys.executable, "-c", api, engine], stdin=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        resources = Resources()
        resources._own = psutil.Process(parent.pid)
        assert wait_for(lambda: resources._read_processes()["helpers"].open_fds > 0)
        assert set(resources._read_processes()) == {"api", "helpers"}
        parent.stdin.write(b"\n")
        parent.stdin.flush()
        assert wait_for(lambda: set(resources._read_processes()) == {"api", "engine", "helpers"})


class Nvml:
    """The part of NVML's module that is used: two GPUs, the second of which is what a divided one is."""

    class NVMLError(Exception):
        pass

    def __init__(self, driver: bool = True) -> None:
        self.driver = driver
        self.lost: set[int] = set()

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle in self.lost:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(used=(handle + 1) << 30, total=140 << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=37, memory=5)


def test_gpus_are_shown_as_far_as_they_answer() -> None:
    nvml, registry = Nvml(), CollectorRegistry()
    resources, gpus = Resources(), Gpus(nvml)
    registry.register(resources)

    def shown(name: str, index: int) -> float | None:
        labels = {"gpu": str(index), "uuid": f"GPU-{index}", "name": "NVIDIA H200"}
        return registry.get_sample_value(f"xlora_gpu_{name}", labels)

    resources.read(gpus)
    assert [shown("memory_used_bytes", index) for index in (0, 1)] == [1 << 30, 2 << 30]
    assert shown("memory_total_bytes", 1) == 140 << 30
    assert [shown("utilization_ratio", index) for index in (0, 1)] == [0.37, None]
    nvml.lost = {0}
    resources.read(gpus)
    assert [shown("memory_used_bytes", index) for index in (0, 1)] == [None, 2 << 30]
    nvml.lost = set()
    resources.read(gpus)
    assert shown("memory_used_bytes", 0) == 1 << 30


@pytest.mark.parametrize("nvml", [None, Nvml(driver=False)])
def test_without_the_library_or_a_driver_there_are_no_gpus(nvml: Any) -> None:
    assert Gpus(nvml).read() == []


def test_our_calls_are_the_library_s() -> None:
    """The stand-in knows nothing that NVML's module lacks."""
    pynvml = pytest.importorskip("pynvml", reason="the extra `gpu` is not installed")
    used = [name for name in vars(Nvml) if name.startswith(("nvml", "NVML"))]
    assert [name for name in used if not hasattr(pynvml, name)] == []
    assert Gpus().read() is not None


def test_an_old_reading_is_not_shown() -> None:
    """A driver that never answers leaves the thread waiting; what it said a minute ago would look like news."""
    resources = Resources()
    assert list(resources.collect()) == []
    resources.read(Gpus(None))
    assert [sample.labels["process"] for family in resources.collect() for sample in family.samples][:1] == ["api"]
    assert resources._reading is not None
    resources._reading = Reading(time.monotonic() - 60, resources._reading.processes)
    assert list(resources.collect()) == []
