"""The whole fuzzing of a server on the demo: connections that misbehave, bodies, then paths and headers.

    python -m tests.fuzz [CASES_PER_OPERATION] [MORE FLAGS OF SCHEMATHESIS]

Ends with schemathesis's exit code, or 1 where another part found something. The server has a short context, so that a
case takes milliseconds.
"""

from __future__ import annotations

import os
import random
import sys

from tests.fuzz import paths
from tests.fuzz.bodies import fuzz_bodies
from tests.fuzz.connections import fuzz_connections
from tests.support.server_process import server


def main(arguments: list[str]) -> int:
    cases, *flags = arguments or ["100"]
    seed = random.randrange(1 << 32)
    print(f"connections, seed {seed}: {dict(fuzz_connections(count=2000, seconds=60, seed=seed))}")
    os.environ["XLORA_API_KEYS"] = paths.KEY
    with server("--threads", "1", "--max-model-len", "128", "--log-level", "error") as running:
        finished = fuzz_bodies(running, int(cases), *flags)
        print(finished.stdout, finished.stderr)
        alive, _ = running.get("/readyz")
    return finished.returncode or alive != 200 or paths.main([])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
