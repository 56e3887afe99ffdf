"""The commands and scripts that the documents show, run as a reader would run them.

A fenced block of `sh` or `python` is an example, and a block of `text` right behind it is what it prints. The examples
of one document run in their order, in one folder that looks like a checkout, against one server of the demo. A line
`...` in an output stands for any lines; ids, rates and sizes of the machine are not compared.

    python -m tests.support.documents README.md        writes what the examples print today into the documents named
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.server_process import ROOT, server

DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
# Examples that no test runs here, by what their text contains, and why.
NOT_RUN = {
    r"^make ": "the slow test of a fresh clone runs what of it installs and serves",
    r"pip install|(^|/)pip ": "it changes the environment that all tests share",
    r"\bdocker\b": "it needs Docker; docker/verify.sh and docker/verify_compose.py run it",
    r"\bkubectl\b": "it needs a Kubernetes cluster; tests/repo/test_kubernetes.py checks the manifests",
    r"\bray (start|get-auth-token)|xlora-serve cluster": "it starts Ray; tests/e2e/test_replicas.py does",
    r"--tensor-parallel": "it serves on several devices; tests/e2e/test_tensor_parallel.py does",
    r"\b(lm-eval|guidellm) run": "these tools have environments of their own",
    r"xlora-serve distill": "it trains for minutes; tests/tools/test_distill.py trains a tiny one",
    r"benchmarks\.(faults|rolling_upgrade|gpu_session)": "it takes minutes, and other programs",
}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_VARYING = (
    (re.compile(r"\b(gen|req|chatcmpl|cmpl|cmp)-[0-9a-f]{32}\b"), r"\1-ID"),
    (re.compile(r"'id': '\w{9}'"), "'id': 'ID'"),
    (re.compile(r"[\d,.]+ tokens/s"), "N tokens/s"),
    (re.compile(r"this machine has [\d.]+ GiB"), "this machine has N GiB"),
    (re.compile(r"\d\.\de-\d\d"), "ROUNDING"),  # largest differences from PEFT
    (re.compile(r"PEFT [\d.]+"), "PEFT VERSION"),
)
_PRECISE = re.compile(r"\d+\.\d{6,}")  # a number with all digits that a float32 has
_ROUNDING = 1e-5
_LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Example:
    """One block of a document, and what it prints where the document says."""

    document: str
    line: int
    language: str
    text: str
    printed: str | None
    place: tuple[int, int]  # of `printed` in the document's text

    @property
    def not_run(self) -> str | None:
        """Why no test runs it, where none does."""
        found = (why for pattern, why in NOT_RUN.items() if re.search(pattern, self.text, re.MULTILINE))
        return next(found, None)

    @property
    def loads_a_model(self) -> bool:
        """Whether it takes seconds, where a request to a running server takes none."""
        return "xlora-serve" in self.text or "from service" in self.text or "docs/" in self.text

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def examples(document: str) -> list[Example]:
    """The examples of one document, in their order."""
    text = (ROOT / document).read_text()
    blocks = list(_BLOCK.finditer(text))
    following = [*blocks[1:], None][: len(blocks)]
    found = []
    for block, after in zip(blocks, following, strict=True):
        if block[1] not in ("sh", "python"):
            continue
        line = text.count("\n", 0, block.start()) + 1
        printed = after if after and after[1] == "text" and not text[block.end() : after.start()].strip() else None
        place = printed.span(2) if printed else (0, 0)
        found.append(Example(document, line, block[1], block[2], printed[2] if printed else None, place))
    return found


class Workspace:
    """A checkout in which examples run, with its environment in .venv, and the port of the server that they ask."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port

    @classmethod
    def like_a_checkout(cls, folder: Path, port: int) -> Workspace:
        """This checkout's files in a folder of their own, with the environment of the tests as its .venv."""
        for path in ROOT.iterdir():
            if not path.name.startswith("."):
                (folder / path.name).symlink_to(path)
        commands = folder / ".venv/bin"
        commands.mkdir(parents=True)
        for name, program in (("python", ""), ("xlora-serve", "-m service")):
            (commands / name).write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {program} "$@"\n')
            (commands / name).chmod(0o755)
        return cls(folder, port)

    def run(self, example: Example) -> str:
        """What it prints. Raises AssertionError with its stderr where it fails."""
        path = self.folder / f"example.{'sh' if example.language == 'sh' else 'py'}"
        path.write_text(example.text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}"))
        program = ["bash", "-euo", "pipefail"] if example.language == "sh" else [str(self.folder / ".venv/bin/python")]
        path_variable = f"{self.folder / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [*program, str(path)],
            cwd=self.folder,
            env=os.environ | {"PATH": path_variable, "MPLBACKEND": "agg", "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_SECONDS,
        )
        path.unlink()
        assert done.returncode == 0, f"{example}: {done.stdout}{done.stderr}"
        assert example.printed is not None or '{"error"' not in done.stdout, f"{example}: {done.stdout}"
        return done.stdout.replace(f"127.0.0.1:{self.port}", "127.0.0.1:8000")


def is_as_printed(printed: str, stated: str) -> bool:
    """Whether an example has printed what its document states. The last digits of weights depend on the processor."""
    lines = _comparable(stated)
    pattern = "".join(r"(?:.*\n)*" if line.strip() == "..." else _pattern(line) + r"\n" for line in lines)
    found = re.fullmatch(pattern, "".join(f"{line}\n" for line in _comparable(printed)))
    numbers = _PRECISE.findall("\n".join(lines))
    return found is not None and all(
        math.isclose(float(ours), float(theirs), abs_tol=_ROUNDING)
        for ours, theirs in zip(found.groups(), numbers, strict=True)
    )


def _pattern(line: str) -> str:
    """It matches a line with any precise numbers."""
    return r"(\d+\.\d+)".join(map(re.escape, _PRECISE.split(line)))


def _comparable(text: str) -> list[str]:
    """Its lines, without empty ones at both ends, and without what differs from run to run."""
    for pattern, constant in _VARYING:
        text = pattern.sub(constant, text)
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def rewrite(document: str, workspace: Workspace) -> None:
    """Puts what the examples print into the document, where it is not what stands there."""
    edits = []
    for example in examples(document):
        if example.not_run:
            continue
        printed, stated = workspace.run(example), example.printed
        if stated is None or is_as_printed(printed, stated):
            continue
        print(f"{example} prints:\n{printed}")
        if "\n...\n" not in stated:  # which lines to leave out is for people to say
            edits.append((example.place, printed.strip("\n") + "\n"))
    text = (ROOT / document).read_text()
    for (begin, end), printed in reversed(edits):
        text = text[:begin] + printed + text[end:]
    (ROOT / document).write_text(text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, server("--threads", "1") as running:
        for number, name in enumerate(sys.argv[1:] or DOCUMENTS):
            place = Path(scratch, str(number))
            place.mkdir()
            rewrite(name, Workspace.like_a_checkout(place, running.port))
