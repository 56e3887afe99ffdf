"""benchmarks.against over a repository of one made-up benchmark: what is run, in which order, and what is compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import against

# {flag} and {extra} differ between the two revisions, and so do the measured seconds.
BENCHMARK = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--log")
parser.add_argument("--fail", action="store_true")
{flag}
args = parser.parse_args()
log = pathlib.Path(args.log)
log.write_text(log.read_text() + "{side}\\n")
assert not args.fail or "{side}" == "ours"
seconds = {seconds} + 0.5 * log.read_text().count("{side}")
print("a line for a person")
rows = [{{"concurrency": 1, "seconds": seconds, "equal": True}}, {{"concurrency": 16, "nested": {{"p50": 2.0}}}}]
print(json.dumps({{"benchmark": "fake", "rows": rows, {extra}: 1.0, "zero": 0.0,
                  "bars": [{{"measured": 3.5}}], "environment": {{"load_1min": 0.5}}}}))
"""


def git(repository: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", *who, *arguments], cwd=repository, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Its commit still has --eager-only, and refuses to run without; the tree has gone on."""
    root = tmp_path / "repository"
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks" / "__init__.py").write_text("")
    benchmark = root / "benchmarks" / "fake.py"
    flag = 'parser.add_argument("--eager-only", action="store_true", required=True)'
    benchmark.write_text(BENCHMARK.format(flag=flag, side="theirs", seconds=3.5, extra='"gone"'))
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "theirs")
    benchmark.write_text(BENCHMARK.format(flag="", side="ours", seconds=1.0, extra='"new"'))
    return root


def start(monkeypatch: pytest.MonkeyPatch, repository: Path, log: Path, *flags: str) -> None:
    log.write_text("")
    monkeypatch.setattr(sys, "argv", ["against", "HEAD", "fake", "--rounds", "3", "--", "--log", str(log), *flags])
    against.main(repository)


def test_sides_take_turns_and_what_both_measure_is_compared(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    start(monkeypatch, repository, log)
    assert log.read_text().split() == ["ours", "theirs"] * 3
    *lines, last = capfd.readouterr().out.splitlines()
    document = json.loads(last)
    assert (document["benchmark"], document["revision"], document["rounds"]) == ("against", "HEAD", 3)
    rows = {row["number"]: row for row in document["rows"]}
    assert list(rows) == ["rows[0].seconds", "rows[1].nested.p50", "zero"]
    assert rows["rows[0].seconds"] == {
        "benchmark": "fake",
        "number": "rows[0].seconds",
        "ours": {"median": 2.0, "min": 1.5, "max": 2.5},
        "theirs": {"median": 4.5, "min": 4.0, "max": 5.0},
        "ratio": pytest.approx(2 / 4.5, abs=1e-4),
    }
    assert (rows["rows[1].nested.p50"]["ratio"], rows["zero"]["ratio"]) == (1.0, None)
    assert any("rows[0].seconds" in line and "ours 2.0 (1.5 to 2.5)" in line for line in lines)
    assert len(git(repository, "worktree", "list").splitlines()) == 1, "the checkout is still there"


def test_a_side_that_fails_is_named(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """... and its checkout removed."""
    with pytest.raises(RuntimeError, match=r"benchmarks/fake\.py failed on theirs"):
        start(monkeypatch, repository, tmp_path / "log", "--fail")
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_an_unknown_revision_is_named_by_git(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["against", "no-such-revision", "fake"])
    with pytest.raises(subprocess.CalledProcessError):
        against.main(repository)
    assert "no-such-revision" in capfd.readouterr().err


def test_what_is_run_by_default_exists() -> None:
    for name in against._DEFAULT:
        assert (against.ROOT / "benchmarks" / f"{name}.py").exists()
