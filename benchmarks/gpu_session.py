"""Everything that a GPU is asked, in one command of at most --minutes: the most important first, each under a limit.

    python -m benchmarks.gpu_session --output DIR [--minutes 9.5]
    python -m benchmarks.gpu_session --output DIR --device cpu --tiny      a rehearsal without a GPU

    first        benchmarks/gpu.py: X-LoRA over its base at 1, 32 and 128 requests, share of the copy's bandwidth
    tests        tests/gpu, then the Triton kernel against the reference
    real_size    benchmarks/real_size.py: a checkpoint of the published shape from its files
    rest         benchmarks/gpu.py: prefill, attention backends, decode without graphs, kernels, memory

Needs torch, transformers and pytest, none of the server's packages. Each job is a process of its own, killed with all
that it started when its time is up. DIR/results.jsonl has every row from the moment it was measured, DIR/JOB.log what
the job said. Where a section of gpu.py hangs or loses the device, the sections after it run in a new process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, environment, note
from benchmarks.gpu import SECTIONS

FIRST = ["copy", "warm_up", "parity", "decode", "step"]
_TESTS = ["tests/gpu", "tests/model/attention/test_triton.py"]
_SMALLEST = 15.0  # seconds: with less left nothing is begun
_TAIL = 12  # lines of a job that failed


@dataclass(frozen=True)
class Job:
    """A command, the seconds it may take, and the sections that it is told to run, if it knows any."""

    name: str
    command: list[str]
    seconds: float
    sections: tuple[str, ...] = ()


def jobs(args: argparse.Namespace, results: Path) -> list[Job]:
    """In the order of their importance."""
    python, to = [sys.executable, "-m"], ["--device", args.device, "--results", str(results)]
    gpu = [*python, "benchmarks.gpu", *to, *(["--tiny", "--dtype", "float32"] if args.tiny else [])]
    first = [*gpu, *([] if args.tiny else ["--requests", "1", "32", "128", "--agreement", "1", "0.7"])]
    workers = ["-n", "6", "--dist", "worksteal"] if find_spec("xdist") and not args.tiny else []
    # A package of another version may warn; that is no reason to lose a result.
    tests = [*python, "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--durations", "10", *workers, *_TESTS]
    size = ["--layers", "1", "--scale", "32", "--tokens", "3"] if args.tiny else ["--layers", "16", "--tokens", "64"]
    rest = [name for name in SECTIONS if name not in FIRST]
    return [
        Job("first", first, 240, tuple(FIRST)),
        Job("tests", tests, 180),
        Job("real_size", [*python, "benchmarks.real_size", *to, "--engine-only", "--captured", *size], 150),
        Job("rest", gpu, 180, tuple(rest)),
    ]


def run_job(job: Job, output: Path, deadline: float) -> list[dict[str, Any]]:
    """Runs a job, again for the sections after one that ended it. Returns a row for each process."""
    results = output / "results.jsonl"
    end = min(deadline, time.monotonic() + job.seconds)
    left, rows = list(job.sections), []
    while True:
        known = _begun(results)
        command = [*job.command, *(["--sections", *left] if left else [])]
        rows.append({"job": job.name, **run_process(command, output / f"{job.name}.log", end - time.monotonic())})
        note(results, rows[-1])
        begun = _begun(results)[len(known) :]
        remaining = [section for section in left if section not in begun]
        if rows[-1]["exit_code"] == 0 or remaining in ([], left) or end - time.monotonic() < _SMALLEST:
            return rows
        left = remaining


def run_process(command: list[str], log: Path, seconds: float) -> dict[str, Any]:
    """Runs a command for at most so many seconds. Its exit code is None where it was killed for its time."""
    started = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
    return {"exit_code": code, "seconds": time.monotonic() - started}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _begun(results: Path) -> list[str]:
    """The sections that have begun, in all processes so far."""
    if not results.exists():
        return []
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return [row["section"] for row in rows if row.get("begins")]


def device_of(name: str) -> str:
    """What nvidia-smi says of the GPU, without making a CUDA context."""
    if name == "cpu":
        return name
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder, made if it is not there")
    parser.add_argument("--minutes", type=float, default=9.5, help="nothing runs longer")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, one or two requests")
    parser.add_argument("--only", nargs="+", default=[], help="names of jobs; default: all")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    if args.device == "cpu":
        os.environ["GPU_REHEARSAL"] = "1"  # tests/gpu/conftest.py
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    note(results, {"job": "session", "device": device_of(args.device), **environment()})
    failed = False
    for job in jobs(args, results):
        if args.only and job.name not in args.only:
            continue
        if deadline - time.monotonic() < _SMALLEST:
            rows: list[dict[str, Any]] = [{"job": job.name, "exit_code": None, "skipped": "out of time"}]
            note(results, rows[0])
        else:
            rows = run_job(job, output, deadline)
        for row in rows:
            print(json.dumps(row), flush=True)
        if any(row["exit_code"] != 0 for row in rows):
            failed = True
            log = output / f"{job.name}.log"
            print(*log.read_text().splitlines()[-_TAIL:] if log.exists() else [], sep="\n", flush=True)
    print(results.read_text())
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
