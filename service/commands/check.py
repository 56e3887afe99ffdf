"""xlora-serve check DIR: a summary of a checkpoint, or everything that is wrong with it, one defect a line.

With --verify the model is loaded as well, and compared with a plain computation. With --plan it is not loaded: what it
would take of the memory is printed.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from rich.console import Console

from service.checkpoint import Checkpoint, Overrides, load_checkpoint
from service.checkpoint.report import describe, find_problems
from service.cli import given_settings, print_error
from service.engine.options import EngineOptions
from service.errors import SettingsError
from service.settings import Settings, load_settings, parse_bytes


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when there is any defect, or when --verify finds a difference."""
    settings = load_settings(given_settings(arguments))
    gpu_bytes = _gpu_bytes(arguments, settings)
    overrides = Overrides.parse(settings.base, settings.expert, settings.ordering)
    problems = find_problems(arguments.directory, overrides=overrides, allow_outside=settings.allow_outside)
    for problem in problems:
        print_error(problem)
    if problems:
        return 1
    checkpoint = load_checkpoint(arguments.directory, overrides=overrides, allow_outside=settings.allow_outside)
    sys.stdout.write(f"{describe(checkpoint).rstrip()}\n")
    if arguments.plan:
        _plan(checkpoint, arguments.directory, settings, gpu_bytes)
    return _verify(checkpoint, arguments.directory, settings) if arguments.verify else 0


def _gpu_bytes(arguments: argparse.Namespace, settings: Settings) -> int | None:
    """--gpu-memory in bytes. Raises SettingsError for what is no size, and where nothing would look at it."""
    if arguments.gpu_memory is None:
        return None
    if not arguments.plan or settings.device == "cpu":
        other = "--device cpu" if arguments.plan else "no --plan"
        raise SettingsError(f"--gpu-memory with {other}", hint="it is for check DIR --plan on a GPU")
    try:
        size = parse_bytes(arguments.gpu_memory)
    except ValueError as error:
        raise SettingsError(f"--gpu-memory: {error}") from None
    assert isinstance(size, int)
    return size


def _plan(checkpoint: Checkpoint, directory: str, settings: Settings, gpu_bytes: int | None) -> None:
    """Prints the plan for the GPU that was described, or for the device that serve would take here."""
    loader, plan = map(importlib.import_module, ("service.engine.loader", "service.engine.plan"))
    options = EngineOptions(
        model=directory,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        kv_memory_bytes=settings.kv_memory,
        block_size=settings.block_size,
        quantization=settings.quantization,
    )
    if gpu_bytes is None:
        gpu_bytes = loader.free_device_bytes(loader.resolve_device(settings.device))
    found = plan.plan_memory(checkpoint, options, gpu_bytes)
    sys.stdout.write(f"{plan.describe_plan(found)}\n")


def _verify(checkpoint: Checkpoint, directory: str, settings: Settings) -> int:
    """Prints the largest differences; 1 where they are more than rounding."""
    loader, verification = map(importlib.import_module, ("service.engine.loader", "service.engine.verify"))
    device = loader.resolve_device(settings.device)
    dtype = loader.resolve_dtype(settings.dtype, checkpoint, device)
    with Console(stderr=True).status("loading") as status:
        options = verification.verify_options(directory)
        found = verification.verify(checkpoint, options, device, dtype, status.update)
    judged = str(dtype) == "torch.float32"
    verdict = "exact" if found.is_exact else "NOT exact" if judged else "not judged in half precision"
    differences = f"scalings {found.scalings:.1e}, logprobs {found.logprobs:.1e}, other tokens {found.other_tokens}"
    sys.stdout.write(f"parity       {found.tokens} greedy tokens on {device}, {dtype}: largest difference\n")
    sys.stdout.write(f"             {differences}: {verdict}\n")
    return 1 if judged and not found.is_exact else 0
