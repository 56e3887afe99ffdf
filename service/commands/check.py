"""xlora-serve check DIR: a summary of a bundle, or everything that is wrong with it, one defect a line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from service.checkpoint import load_checkpoint
from service.checkpoint.report import describe, find_problems
from service.cli import print_error


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when there is any defect."""
    directory = Path(arguments.directory)
    problems = find_problems(directory, allow_outside=arguments.allow_outside)
    for problem in problems:
        print_error(problem)
    if problems:
        return 1
    checkpoint = load_checkpoint(directory, allow_outside=arguments.allow_outside)
    sys.stdout.write(f"{describe(checkpoint).rstrip()}\n")
    return 0
