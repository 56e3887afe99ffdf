"""xlora-serve convert SRC DST: any X-LoRA checkpoint that can be read, as a bundle of ours."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from rich.console import Console

from service.checkpoint import Overrides, load_checkpoint
from service.checkpoint.formats.writer import convert
from service.cli import given_settings
from service.model.loading.skeleton import inspect_base, traversal_sites
from service.settings import load_settings


def run(arguments: argparse.Namespace) -> int:
    """Writes the bundle and reads it again. Raises CheckpointError for any defect; DST is then not there."""
    settings = load_settings(given_settings(arguments))
    overrides = Overrides.parse(settings.base, settings.expert, settings.ordering, settings.gate_relu)
    overrides = dataclasses.replace(overrides, rescue=arguments.rescue)
    target = Path(arguments.target)
    with Console(stderr=True).status(f"reading {arguments.source}") as status:
        checkpoint = load_checkpoint(
            arguments.source,
            overrides=overrides,
            allow_outside=settings.allow_outside,
            inspect_base=inspect_base,
            on_progress=status.update,
        )
        convert(
            checkpoint,
            target,
            traversal_sites(checkpoint),
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            reference_base=arguments.reference_base,
            on_progress=status.update,
        )
        written = load_checkpoint(target, allow_outside=arguments.reference_base)
    sys.stdout.write(f"{target}: {len(written.experts)} experts, {len(written.sites or ())} sites\n")
    if arguments.reference_base and Path(written.base_reference).is_dir():
        sys.stdout.write(f"the base stays at {written.base_reference}: serve with --allow-outside\n")
    return 0
