"""benchmarks/gpu_session.py with stand-ins for its jobs: one that fails or hangs takes no other's turn."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import SECTIONS
from benchmarks.gpu_session import FIRST, Job, jobs, run_job, run_process
from tests.support.waiting import wait_for

SECTIONED = """
import json, os, sys
results, fails = sys.argv[1], sys.argv[2]
for section in sys.argv[4:]:
    with open(results, "a") as file:
        print(json.dumps({"section": section, "begins": True}), file=file, flush=True)
        if section == fails:
            os._exit(1)
        print(json.dumps({"section": section, "value": 1}), file=file)
"""


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("fails", "processes"), [("none", [0]), ("a", [1, 0]), ("b", [1, 0]), ("c", [1])])
def test_sections_after_one_that_ends_the_process(tmp_path: Path, fails: str, processes: list[int]) -> None:
    command = [sys.executable, "-c", SECTIONED, str(tmp_path / "results.jsonl"), fails]
    rows = run_job(Job("job", command, 60, ("a", "b", "c")), tmp_path, time.monotonic() + 60)
    assert [row["exit_code"] for row in rows] == processes
    measured = [row["section"] for row in rows_of(tmp_path) if "value" in row]
    assert measured == [name for name in "abc" if name != fails]
    begun = [row["section"] for row in rows_of(tmp_path) if "begins" in row]
    assert begun == ["a", "b", "c"], "none twice"


def test_a_process_that_comes_to_no_section_is_not_tried_again(tmp_path: Path) -> None:
    job = Job("job", [sys.executable, "-c", "raise SystemExit('no model')"], 60, ("a", "b"))
    assert len(run_job(job, tmp_path, time.monotonic() + 60)) == 1
    assert "no model" in (tmp_path / "job.log").read_text()


def test_a_process_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    row = run_process([sys.executable, "-c", code], tmp_path / "log", 5.0)
    assert row["exit_code"] is None
    child = int((tmp_path / "log").read_text().splitlines()[-1])
    assert wait_for(lambda: not is_running(child)), "the child goes on"


def is_running(process: int) -> bool:
    """Whether it is there, and no zombie. A process that was sent SIGKILL ends when the kernel comes to it."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_most_important_come_first(tmp_path: Path) -> None:
    """And every section of gpu.py is asked once."""
    args = argparse.Namespace(device="cuda", tiny=False)
    first, tests, real_size, rest = jobs(args, tmp_path / "results.jsonl")
    assert first.sections == tuple(FIRST)
    assert sorted((*first.sections, *rest.sections)) == sorted(SECTIONS)
    assert "tests/gpu" in tests.command
    assert "benchmarks.real_size" in real_size.command
    assert all(os.path.exists(part) for part in tests.command if part.startswith("tests/"))
