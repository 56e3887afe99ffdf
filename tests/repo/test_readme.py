"""What the README tells people to run, runs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.cli import build_parser
from service.client.engine_client import EngineClient
from service.observability.metrics import Metrics
from service.settings import REMOVED, Settings, flag_of

ROOT = Path(__file__).parents[2]
FLAGS = "| flag | default | |"
DOCUMENTS = sorted(path for path in ROOT.glob("**/*.md") if not any(part.startswith(".") for part in path.parts))


def test_from_peft_to_an_endpoint(tmp_path: Path) -> None:
    """The script as it stands, on a free port, in a folder of its own; it needs no more than serving needs."""
    section = (ROOT / "README.md").read_text().split("### From PEFT to an endpoint")[1]
    script = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert script is not None
    runtime = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    installed = {"service", *sys.stdlib_module_names, *(re.split(r"\W", line)[0] for line in runtime)}
    assert set(re.findall(r"^(?:import|from) (\w+)", script[1], re.MULTILINE)) <= installed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "model_store").symlink_to(ROOT / "model_store")
    (tmp_path / "from_peft.py").write_text(script[1].replace("8001", str(port)))
    done = subprocess.run(
        [sys.executable, "from_peft.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['math', 'code', 'bio', 'tales']"
    assert (tmp_path / "my-model/bundle.json").exists()


def run_script(path: Path, *arguments: str) -> str:
    """What a script of the documentation prints, in a folder beside the model_store."""
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_process(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("### In Python, without a server")[1]
    script = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert script is not None
    (tmp_path / "model_store").symlink_to(ROOT / "model_store")
    (tmp_path / "in_process.py").write_text(script[1])
    printed = run_script(tmp_path / "in_process.py")
    assert "math Ones: 0+7=7, carry 0. Tens: 4+8+0=12. Sum: 127." in printed.splitlines()


@pytest.mark.slow
def test_the_example_ends_in_a_plot(tmp_path: Path) -> None:
    (tmp_path / "heat_map.py").write_text((ROOT / "docs" / "heat_map.py").read_text())
    printed = run_script(tmp_path / "heat_map.py", str(ROOT / "model_store" / "demo"), str(tmp_path / "a.png"))
    assert "positions, sites, experts" in printed
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def table(header: str) -> str:
    """The rows of the README's table that begins so."""
    return (ROOT / "README.md").read_text().split(f"\n{header}\n")[1].split("\n\n")[0]


def test_the_endpoint_table_has_every_route() -> None:
    paths = create_app(EngineClient(), Settings(), Metrics(CollectorRegistry())).openapi()["paths"]
    written = table("| endpoint | what it does |")
    assert [path for path in paths if f"{path}`" not in written] == []
    methods = {path: [name.upper() for name in operations] for path, operations in paths.items()}
    rows = {path: row for row in written.splitlines() for path in paths if f"{path}`" in row}
    assert [(path, name) for path, names in methods.items() for name in names if f"`{name}" not in rows[path]] == []


def test_the_configuration_table_has_every_flag_of_serve_and_no_other() -> None:
    written = set(re.findall(r"--[a-z][a-z-]+", "".join(row.split("|")[1] for row in table(FLAGS).splitlines())))
    commands = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    assert isinstance(commands.choices, dict)
    hidden = {"-h", "--help", *map(flag_of, REMOVED)}
    assert written == set(commands.choices["serve"]._option_string_actions) - hidden


def test_the_configuration_table_has_the_defaults() -> None:
    """Numbers and names in code quotes or alone; what is prose or a size is not compared."""
    compared = {}
    for row in table(FLAGS).splitlines()[1:]:
        flags, default = (cell.strip() for cell in row.split("|")[1:3])
        names = [name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", flags)]
        pairs = zip(names, default.split(", "), strict=False)
        compared |= {name: word.strip("`") for name, word in pairs if re.fullmatch(r"\d+|`[^`]+`", word)}
    assert len(compared) >= 10
    assert {name: str(getattr(Settings(), name)).removesuffix(".0") for name in compared} == compared


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), target
        assert not heading or heading in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    """The names that a renderer gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
