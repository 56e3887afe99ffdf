"""xlora-serve check DIR: a summary of a checkpoint, or everything that is wrong with it, one defect a line."""

from __future__ import annotations

import argparse
import sys

from service.checkpoint import Overrides, load_checkpoint
from service.checkpoint.report import describe, find_problems
from service.cli import given_settings, print_error
from service.settings import load_settings


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when there is any defect."""
    settings = load_settings(given_settings(arguments))
    overrides = Overrides.parse(settings.base, settings.expert, settings.ordering)
    problems = find_problems(arguments.directory, overrides=overrides, allow_outside=settings.allow_outside)
    for problem in problems:
        print_error(problem)
    if problems:
        return 1
    checkpoint = load_checkpoint(arguments.directory, overrides=overrides, allow_outside=settings.allow_outside)
    sys.stdout.write(f"{describe(checkpoint).rstrip()}\n")
    return 0
