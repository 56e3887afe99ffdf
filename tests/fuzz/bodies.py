"""schemathesis against a server: every operation of the OpenAPI document, every check, keys included."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.paths import KEY
from tests.support.server_process import Server

# What fits the document may still be too long for the context, or name a token or a model that is not there.
CONFIGURATION = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "404"]
"""


def fuzz_bodies(running: Server, cases: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """One run against a server that takes KEY; its output is captured."""
    url = f"http://127.0.0.1:{running.port}/openapi.json"
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "schemathesis.toml").write_text(CONFIGURATION)
        command = ["run", url, "--max-examples", str(cases), "--checks", "all", "-H", f"Authorization: Bearer {KEY}"]
        return subprocess.run(
            [Path(sys.executable).with_name("schemathesis"), *command, *flags],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
