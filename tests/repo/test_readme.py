"""What the documents refer to is there. What they show to run is in test_documents.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from service.cli import build_parser
from service.settings import REMOVED, flag_of

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path for path in ROOT.glob("**/*.md") if not any(part.startswith(".") for part in path.parts))
MAX_README_LINES = 320


def test_the_export_needs_no_more_than_serving() -> None:
    """Its imports are installed by `make serve`."""
    section = (ROOT / "README.md").read_text().split("## Your own model")[1]
    script = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert script is not None
    runtime = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    installed = {"service", *sys.stdlib_module_names, *(re.split(r"\W", line)[0] for line in runtime)}
    assert set(re.findall(r"^(?:import|from) (\w+)", script[1], re.MULTILINE)) <= installed


@pytest.mark.slow
def test_the_example_ends_in_a_plot(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/heat_map.py"), str(ROOT / "model_store/demo"), str(picture)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "positions, sites, experts" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_flags_of_serve_are_those_of_the_configuration() -> None:
    """The table is written from the settings; a setting without a flag would be a promise that the parser breaks."""
    rows = re.findall(r"^\| `(--[a-z-]+)` \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
    commands = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    assert isinstance(commands.choices, dict)
    hidden = {"-h", "--help", *map(flag_of, REMOVED)}
    assert set(rows) == set(commands.choices["serve"]._option_string_actions) - hidden


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), target
        assert not heading or heading in anchors(file.read_text()), target


def test_the_files_of_the_structure_are_there() -> None:
    """A name may leave out the folder that its sentence is about."""
    named = set(re.findall(r"`([\w/]+\.(?:py|h|js))`", (ROOT / "docs/structure.md").read_text()))
    kept = [
        str(path.relative_to(ROOT))
        for room in ("service", "tests", "benchmarks", "docs")
        for path in (ROOT / room).rglob("*.*")
    ]
    assert len(named) > 50
    assert [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in kept)] == []


def anchors(text: str) -> set[str]:
    """The names that a renderer gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
