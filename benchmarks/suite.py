"""Runs benchmarks one after another, and prints all their bars in one table.

    python -m benchmarks.suite vs_peft throughput [-- FLAGS FOR EACH]

Each runs in a process of its own; the last line of its output is one JSON document, and so is the last line here. Ends
with exit code 1 where one of them failed to run. A bar that is missed is no failure: on a busy machine it may be noise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Bar, print_bars, rounded


def run(name: str, flags: list[str], root: Path = ROOT) -> dict[str, Any] | None:
    """Runs one of the checkout at `root`, showing what it says. Returns its document, or None where it failed."""
    print(f"== benchmarks/{name}.py", flush=True)
    last = ""
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    if process.returncode != 0:
        return None
    document: dict[str, Any] = json.loads(last)
    return document


def bars_of(document: dict[str, Any]) -> list[Bar]:
    """The bars of a benchmark's document, under its name."""
    return [
        Bar(f"{document['benchmark']}: {bar['what']}", bar["sign"], bar["limit"], bar["measured"])
        for bar in document.get("bars", ())
    ]


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, flags = arguments[:split], arguments[split + 1 :]
    if not names or names[0] in ("-h", "--help"):
        print(__doc__)
        return
    documents = {name: run(name, flags) for name in names}
    bars = [bar for document in documents.values() if document is not None for bar in bars_of(document)]
    failed = [name for name, document in documents.items() if document is None]
    print("== all bars")
    print_bars(bars)
    if failed:
        print(f"failed to run: {', '.join(failed)}")
    met = sum(bar.met for bar in bars)
    print(json.dumps(rounded({"benchmark": "suite", "bars": len(bars), "met": met, "documents": documents})))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
