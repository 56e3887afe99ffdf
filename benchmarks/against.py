"""This tree against another revision of it: benchmarks of both take turns, and what both measure is compared.

    python -m benchmarks.against REV [NAMES] [--rounds 3] [-- FLAGS FOR EACH]

REV is checked out beside this tree and runs in the same Python. Without names and flags, a set of minutes that covers
one request, 16 requests, a prefill of 1,000 tokens, a prefix hit and a long context. Each round runs every side once.

    ratio    ours over theirs, by medians; for seconds, under 1 is faster
    ( )      smallest and largest of a side: a ratio within their overlap may be noise

Numbers are matched by their place in the benchmarks' documents; counts and settings, which are whole, are left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT, emit, rounded
from benchmarks.suite import run

_DEFAULT = {
    "vs_base": ["--no-large"],
    "throughput": ["--concurrency", "1", "16"],
    "prefix_cache": [],
    "context": ["--contexts", "128", "2048"],
}
_NOT_MEASURED = {"bars", "environment"}
_REMOVED = ("--eager-only",)  # flags of older revisions that leave out what is no longer here


@contextmanager
def checkout(root: Path, revision: str) -> Iterator[Path]:
    """Another revision of the repository at `root` in a temporary folder."""
    git = ["git", "-C", str(root)]
    with tempfile.TemporaryDirectory(prefix="against-") as folder:
        tree = Path(folder) / "theirs"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def removed_flags(name: str, tree: Path) -> list[str]:
    """Those that a tree's benchmark still has."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    shown = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False).stdout
    return [flag for flag in _REMOVED if flag in shown]


def numbers(document: Any, place: str = "") -> dict[str, float]:
    """What a document has measured, by place, such as rows[1].ratio."""
    if isinstance(document, float):
        return {place: document}
    items: list[tuple[str, Any]] = []
    if isinstance(document, dict):
        items = [(f"{place}.{key}".lstrip("."), item) for key, item in document.items() if key not in _NOT_MEASURED]
    elif isinstance(document, list):
        items = [(f"{place}[{number}]", item) for number, item in enumerate(document)]
    return {found: value for at, item in items for found, value in numbers(item, at).items()}


def compare(trees: dict[str, Path], name: str, flags: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row per number that all runs of both trees report. Raises RuntimeError where one of them fails."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in trees}
    own_flags = {side: [*flags, *removed_flags(name, tree)] for side, tree in trees.items()}
    for _ in range(rounds):
        for side, tree in trees.items():
            print(f"== {side}", flush=True)
            document = run(name, own_flags[side], tree)
            if document is None:
                raise RuntimeError(f"benchmarks/{name}.py failed on {side}, in {tree}")
            runs[side].append(numbers(document))
    every = [one for own in runs.values() for one in own]
    places = [place for place in every[0] if all(place in one for one in every)]
    return [_row(name, place, {side: [one[place] for one in own] for side, own in runs.items()}) for place in places]


def _row(name: str, place: str, measured: dict[str, list[float]]) -> dict[str, Any]:
    sides = {side: {"median": median(own), "min": min(own), "max": max(own)} for side, own in measured.items()}
    ours, theirs = sides["ours"]["median"], sides["theirs"]["median"]
    return {"benchmark": name, "number": place, **sides, "ratio": ours / theirs if theirs else None}


def print_table(rows: list[dict[str, Any]]) -> None:
    """For a person."""
    for row in rows:
        cells = []
        for side in ("ours", "theirs"):
            own = rounded(row[side], 3)
            cells.append(f"{side} {own['median']} ({own['min']} to {own['max']})")
        print(f"{row['benchmark']}: {row['number']:<44} {cells[0]:<36} {cells[1]:<38} ratio {rounded(row['ratio'], 3)}")


def main(root: Path = ROOT) -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="what to compare with: a commit, tag or branch")
    parser.add_argument("names", nargs="*", metavar="NAMES", help=f"benchmarks; default: {' '.join(_DEFAULT)}")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    args = parser.parse_intermixed_args(arguments[:split])
    flags = arguments[split + 1 :]
    rows = []
    with checkout(root, args.revision) as tree:
        for name in args.names or _DEFAULT:
            own = flags if split < len(arguments) else _DEFAULT.get(name, [])
            rows += compare({"ours": root, "theirs": tree}, name, own, args.rounds)
    print_table(rows)
    emit({"benchmark": "against", "revision": args.revision, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
