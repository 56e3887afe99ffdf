"""schemathesis against the real server: every operation of the OpenAPI document, every check, keys included; before it,
connections that misbehave (fuzz_connections.py).

    python -m tests.fuzz [CASES_PER_OPERATION] [MORE FLAGS OF SCHEMATHESIS]

Then paths and headers over raw sockets (fuzz_paths.py). Ends with schemathesis's exit code, or 1 where another part
found something. The server has a short context, so that a case takes milliseconds.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import fuzz_paths
from tests.fuzz_connections import fuzz_connections
from tests.fuzz_paths import KEY
from tests.server_process import Server, server

# What fits the document may still be too long for the context, or name a token or a model that is not there.
CONFIGURATION = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "404"]
"""


def fuzz(running: Server, cases: int, *flags: str) -> subprocess.CompletedProcess[str]:
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


def main(arguments: list[str]) -> int:
    """The full run, on the demo."""
    cases, *flags = arguments or ["100"]
    seed = random.randrange(1 << 32)
    print(f"connections, seed {seed}: {dict(fuzz_connections(count=2000, seconds=60, seed=seed))}")
    os.environ["XLORA_API_KEYS"] = KEY
    with server("--threads", "1", "--max-model-len", "128", "--log-level", "error") as running:
        finished = fuzz(running, int(cases), *flags)
        print(finished.stdout, finished.stderr)
        alive, _ = running.get("/readyz")
    return finished.returncode or alive != 200 or fuzz_paths.main([])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
