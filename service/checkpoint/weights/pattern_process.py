"""Matches the patterns of an adapter_config.json in a process of its own, whose time can be limited: some expressions
take practically forever, and Python's matcher cannot be interrupted.

    python -I -S pattern_process.py SECONDS  <  {"patterns": [...], "sites": [...]}

writes, for every site, the index of the first pattern that matches it, or null. Run as a file, not as a module:
it then starts in milliseconds, without what the package imports.
"""

import json
import re
import resource
import sys

MEMORY_BYTES = 1 << 30


def main() -> None:
    """Reads patterns and sites, matches them, and writes the indices."""
    seconds = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    task = json.load(sys.stdin)
    compiled = [re.compile(pattern) for pattern in task["patterns"]]
    found = [next((i for i, pattern in enumerate(compiled) if pattern.match(site)), None) for site in task["sites"]]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
