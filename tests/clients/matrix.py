"""Clients of OpenAI's protocol, each in an environment of its own, against a running server.

versions.toml has the clients, programs/ what is tried with each. A program runs in its client's environment and writes
one line of JSON; this file makes environments, runs programs, and writes the table of docs/clients.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs/clients.md"
FEATURES = ("chat", "streaming", "structured answer", "tool call", "ten turns")
_PROGRAMS = HERE / "programs"
_INSTALL_SECONDS = 900
_RUN_SECONDS = 300
_BEGIN, _END = "<!-- table: python -m tests.clients --write -->", "<!-- end -->"

Found = Mapping[str, str | None]  # by feature: why not, or None


class NotToBeHadError(Exception):
    """The packages of a client cannot be installed here."""


@dataclass(frozen=True)
class Client:
    """One client, and what it takes to try it."""

    name: str
    title: str
    program: str
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    setting: str = ""

    @property
    def version(self) -> str:
        """Of the first package, as it is pinned."""
        return [*self.pip, *self.npm][0].replace("==", "@").rpartition("@")[2]


def clients() -> list[Client]:
    """All that versions.toml has."""
    stated = tomllib.loads((HERE / "versions.toml").read_text())
    return [
        Client(name, one["title"], one["program"], tuple(one.get("pip", ())), tuple(one.get("npm", ())),
               one.get("setting", ""))
        for name, one in stated.items()
    ]  # fmt: skip


def run(client: Client, environments: Path, port: int) -> Found:
    """What came of each feature. Raises NotToBeHadError, and RuntimeError where the program says nothing."""
    command = [*_prepare(client, environments), f"http://127.0.0.1:{port}/v1"]
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # it asks a file of prices otherwise, and waits for it
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=_RUN_SECONDS)
    try:
        found: Found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"{client.name} said nothing: {done.stderr[-2000:]}") from None
    return found


def write_table(found: Mapping[str, Found]) -> None:
    """Puts what came of all clients into the document."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    DOCUMENT.write_text(f"{before}{_BEGIN}\n{table(found)}{_END}{after}")


def table(found: Mapping[str, Found]) -> str:
    """A line per client, a column per feature."""
    lines = [f"| client | version | {' | '.join(FEATURES)} |", "|---" * (2 + len(FEATURES)) + "|"]
    for client in clients():
        if client.name in found:
            cells = [_cell(found[client.name], feature) for feature in FEATURES]
            lines.append(f"| {client.title} | {client.version} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Found, feature: str) -> str:
    if feature not in found:
        return ""
    return "yes" if found[feature] is None else f"no: {found[feature]}".replace("|", "\\|")


def _prepare(client: Client, environments: Path) -> list[str]:
    """What runs the client's program; clients with the same packages share an environment."""
    packages = client.pip or client.npm
    place = environments.resolve() / next(one.name for one in clients() if (one.pip or one.npm) == packages)
    stamp = place / "installed.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != list(packages):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _install(client, place)
        stamp.write_text(json.dumps(packages))
    if client.npm:  # node looks for packages beside the program
        shutil.copy(_PROGRAMS / client.program, place)
        return ["node", str(place / client.program)]
    return [str(place / "bin/python"), str(_PROGRAMS / client.program)]


def _install(client: Client, place: Path) -> None:
    if client.npm:
        if shutil.which("npm") is None:
            raise NotToBeHadError("npm is not installed")
        _call(["npm", "install", "--no-audit", "--no-fund", "--save-exact", *client.npm], place)
        return
    _call([sys.executable, "-m", "venv", str(place)], place)
    _call([str(place / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *client.pip], place)


def _call(command: list[str], place: Path) -> None:
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotToBeHadError(f"{command[0]} took over {_INSTALL_SECONDS} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        raise NotToBeHadError(lines[-1][:300])
