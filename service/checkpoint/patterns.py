r"""The regular expressions of rank_pattern and alpha_pattern: which one holds for which module.

A pattern matches the end of a module's path (PEFT's `get_pattern_key`): `q_proj`, `layers\.(0|1)\..*_proj`. Names are
matched here; anything with an operator in a process that is stopped when it takes too long (pattern_process.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.checkpoint.defects import defect

MAX_SECONDS = 5
MAX_PATTERNS, MAX_CHARACTERS = 10_000, 1_000_000  # of one field, and of all its patterns together
MAX_MATCHES = 100_000  # of names with modules that are tried here; more are tried in the other process
NAME = re.compile(r"(\w|-|\\?\.)*")  # letters, digits, hyphens and dots, escaped or not
PROCESS = Path(__file__).with_name("pattern_process.py")


def match_patterns(patterns: Mapping[str, Any], sites: Sequence[str], source: Path, field: str) -> dict[str, Any]:
    """{site: value of the first pattern that matches it}, for the sites that one matches.

    Raises CheckpointError for what is no regular expression, and for what cannot be matched in MAX_SECONDS.
    """
    names, values = list(patterns), list(patterns.values())
    if len(names) > MAX_PATTERNS or sum(map(len, names)) > MAX_CHARACTERS:
        expected = f"expected at most {MAX_PATTERNS:,} patterns, of {MAX_CHARACTERS:,} characters in all"
        raise defect(source, f"{field}: {expected}, found {len(names):,}, of {sum(map(len, names)):,}")
    for name in names:
        try:
            re.compile(_at_the_end(name))
        except (re.error, OverflowError, RecursionError) as error:
            raise defect(source, f"{field}: {name!r:.80} is not a regular expression: {error}") from error
    are_names = all(NAME.fullmatch(name) for name in names) and len(names) * len(sites) <= MAX_MATCHES
    found = _match_here(names, sites) if are_names else _match_in_process(names, sites, source, field)
    return {site: values[index] for site, index in zip(sites, found, strict=True) if index is not None}


def _match_here(names: Sequence[str], sites: Sequence[str]) -> list[int | None]:
    compiled = [re.compile(_at_the_end(name)) for name in names]
    return [next((i for i, pattern in enumerate(compiled) if pattern.match(site)), None) for site in sites]


def _match_in_process(names: Sequence[str], sites: Sequence[str], source: Path, field: str) -> list[int | None]:
    task = json.dumps({"patterns": [_at_the_end(name) for name in names], "sites": sites})
    command = [sys.executable, "-I", "-S", str(PROCESS), str(MAX_SECONDS)]
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=2 * MAX_SECONDS, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        problem = f"{field}: expected patterns that {len(sites)} modules are matched with in {MAX_SECONDS} s"
        hint = "write the modules' names, or patterns without a repetition inside another"
        raise defect(source, f"{problem}, found {names!r:.120}", hint) from error
    found: list[int | None] = json.loads(done.stdout)
    return found


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
