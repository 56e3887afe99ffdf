"""Tries every client against the demo: python -m tests.clients [--environments DIR] [--write] [NAME ...]

Environments are kept in DIR, and made again where versions.toml has changed; it takes some minutes and 2 GB the first
time. --write puts the table into docs/clients.md. Exit code 1: something did not work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.clients.matrix import FEATURES, Found, NotToBeHadError, clients, run, table, write_table
from tests.support.server_process import server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; all when absent")
    parser.add_argument("--environments", type=Path, default=Path(".venv-clients"))
    parser.add_argument("--write", action="store_true", help="write the table of docs/clients.md")
    arguments = parser.parse_args()
    wanted = [client for client in clients() if client.name in (arguments.names or [client.name])]
    found: dict[str, Found] = {}
    missing = False
    with server("--threads", "1") as running:
        for client in wanted:
            print(client.name, end=" ", flush=True)
            try:
                found[client.name] = run(client, arguments.environments, running.port)
            except (NotToBeHadError, RuntimeError) as error:
                print(f"not tried: {error}")
                missing = True
            else:
                print(*(f"{name}: {reason}" for name, reason in found[client.name].items() if reason), "done")
    print(table(found))
    if arguments.write:
        write_table(found)
    assert all(feature in FEATURES for one in found.values() for feature in one)
    return int(missing or any(reason is not None for one in found.values() for reason in one.values()))


if __name__ == "__main__":
    sys.exit(main())
