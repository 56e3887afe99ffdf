"""The files around the code agree with each other: pins and image. For docker/ see test_deployment.py."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import service

ROOT = Path(__file__).parents[2]


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {_normalised(package): version for package, version in pairs}


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _requirements(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    return {_normalised(re.match(r"[\w.-]+", one)[0]) for one in wanted}


@pytest.mark.parametrize(
    ("constraints", "extras"),
    [("constraints.txt", ("test", "dev", "plot", "ray", "gpu")), ("constraints-min.txt", ("test",))],
)
def test_every_dependency_is_pinned(constraints, extras):
    assert _requirements(*extras) <= set(_pins(constraints))


def test_oldest_versions_are_the_stated_minimum():
    """`make test-min` tests what pyproject.toml promises for the libraries the model code leans on."""
    text = (ROOT / "pyproject.toml").read_text()
    pins = _pins("constraints-min.txt")
    for package in ("transformers", "huggingface_hub"):
        stated = re.search(rf'"{package}>=([\d.]+)', text)[1]
        assert pins[_normalised(package)].startswith(stated + ".")


def test_image_has_the_pinned_torch_and_the_version():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f'ARG TORCH="torch=={_pins("constraints.txt")["torch"]}"' in dockerfile
    assert f"ARG VERSION={service.__version__}\n" in dockerfile


def test_what_is_no_test_is_support():
    """Beside the tests lie their conftest files; what several share is in support/, fuzz/ and clients/ are programs."""
    tests = ROOT / "tests"
    shared = ("support", "fuzz", "clients")
    others = [path.relative_to(tests) for path in tests.rglob("*.py") if path.relative_to(tests).parts[0] not in shared]
    assert [path for path in others if not path.name.startswith("test_") and path.name != "conftest.py"] == []


WRITTEN = re.compile(
    r"(?:--output |--png |--prompts |-o )([a-z][\w.-]*\.\w+)"
    r"|convert \S+ ([a-z][\w-]*)|export\(model, tokenizer, \"([\w-]+)\""
)


def test_files_that_commands_of_the_documentation_write_are_ignored():
    """Whoever pastes them in a clone finds no change in `git status`."""
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    names = {name for path in documents for found in WRITTEN.findall(path.read_text()) for name in found if name}
    assert {"my-model", "answers.jsonl", "scalings.npz", "prompts.txt"} <= names
    paths = [f"{name}/bundle.json" if "." not in name else name for name in sorted(names)]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *paths], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == paths
