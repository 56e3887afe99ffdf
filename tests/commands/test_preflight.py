"""Mistakes that show before anything is loaded: one error, no line before it, and no import that takes seconds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service import cli
from service.commands import preflight
from tests.support.fake_engine import write_bundle
from tests.support.server_process import ROOT

HEAVY = ("torch", "transformers", "fastapi", "uvicorn")
# Runs a command as the console script does, and then says on standard output which heavy packages were imported.
PROGRAM = """
import os, sys
from service.cli import main
directory, *words = sys.argv[1:]
os.chdir(directory)
code = main(words)
print(*({name} & set(sys.modules)))
sys.exit(code)
""".replace("{name}", repr(set(HEAVY)))


def remove_comma(bundle: Path) -> None:
    (bundle / "bundle.json").write_text('{"name": "x"\n "base": "base"}')


def break_expert(bundle: Path) -> None:
    (bundle / "experts" / "math").mkdir(parents=True)
    (bundle / "experts" / "math" / "adapter_config.json").write_text("{")


def nothing(bundle: Path) -> None:
    """The bundle as it is."""


# What is done to the bundle, the words of the command in its folder, and parts of the error and of the hint.
CASES: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "no model": (nothing, "serve", "no model_store/demo in ", "name a model with --model"),
    "no model, generate": (nothing, "generate --prompt a", "no model_store/demo in ", "name a model with --model"),
    "nowhere": (
        nothing,
        "serve --model ./nowhere/at/all",
        "expected the directory of a checkpoint, found nothing",
        "hub",
    ),
    "a file": (nothing, "serve --model tokenizer.json", "found a file", "hub id"),
    "no checkpoint": (
        lambda bundle: (bundle / "bundle.json").unlink(),
        "serve --model .",
        "found none of",
        "bundle.json",
    ),
    "broken JSON": (remove_comma, "serve --model .", "bundle.json: broken JSON at line 2, column 2", ""),
    "broken expert": (break_expert, "serve --model .", "math/adapter_config.json: broken JSON at line 1", ""),
    "check nowhere": (nothing, "check ./no/where/here", "found nothing", "hub id"),
    "convert nowhere": (nothing, "convert ./no/where/here out", "found nothing", "hub id"),
    "a value": (
        nothing,
        "serve --model . --max-num-seqs x",
        "--max-num-seqs 'x': should be a valid integer",
        "most seq",
    ),
    "an expert": (nothing, "serve --model . --expert math", "--expert 'math' should be NAME=PATH", "math=/models"),
    "an expert's place": (nothing, "serve --model . --expert a=./b/c/d", "--expert a: expected a directory", ""),
    "a base": (nothing, "generate --prompt a --model . --base ./b/c/d", "--base: expected a directory", ""),
    "keys": (nothing, "serve --model . --api-key-file none", "--api-key-file none cannot be read: No such file", ""),
    "certificate": (nothing, "serve --model . --ssl-certfile none", "--ssl-certfile none cannot be read: No such", ""),
    "no certificate": (nothing, "serve --model . --ssl-certfile bundle.json", "no certificate chain", "PEM"),
    "key alone": (nothing, "serve --model . --ssl-keyfile bundle.json", "need --ssl-certfile", ""),
    "address": (
        nothing,
        "serve --model . --host 192.0.2.1",
        "192.0.2.1:8000: this machine has no such address",
        "0.0.0.0",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_error_before_anything_heavy(case: tuple[Callable[[Path], None], str, str, str], tmp_path: Path) -> None:
    damage, line, problem, hint = case
    bundle = write_bundle(tmp_path / "bundle")
    damage(bundle)
    command = [sys.executable, "-c", PROGRAM, str(bundle), *line.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    first, *rest = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "\n")
    assert first.startswith("error: ")
    assert problem in first
    assert [line.split(":")[0] for line in rest] == (["hint"] if hint else [])
    assert hint in "".join(rest)


def test_a_taken_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", str(bundle), "--port", str(port)]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: cannot listen on 127.0.0.1:{port}: the port is in use"
    assert "--port" in hint


def test_the_demo_passes() -> None:
    """All parts that are parsed are there, and so none of the patterns has come to match nothing."""
    from_file = json.loads((ROOT / "model_store/demo/bundle.json").read_text())
    assert {entry["path"].split("/")[0] for entry in from_file["experts"]} == {"experts"}

    preflight.check_model(str(ROOT / "model_store/demo"))
    assert all(list((ROOT / "model_store/demo").glob(pattern)) for pattern in preflight._PARTS)
