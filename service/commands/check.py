"""xlora-serve check DIR: a summary of a checkpoint, or everything that is wrong with it, one defect a line.

With --verify the model is loaded as well, and compared with PEFT's own, or a plain computation where PEFT cannot do it.
With --plan it is not loaded: what it would take of the memory is printed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

from rich.console import Console

from service.checkpoint import Checkpoint, Overrides
from service.checkpoint.base import BaseModel
from service.checkpoint.report import describe, examine
from service.cli import PLAN_FLAGS, given_settings, print_error
from service.contract.errors import SettingsError
from service.contract.options import EngineOptions
from service.settings import Settings, load_settings, parse_bytes


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when there is any defect, or when --verify finds a difference."""
    settings = load_settings(given_settings(arguments))
    _check_flags(arguments, settings)
    gpu_bytes = _gpu_bytes(arguments)
    overrides = Overrides.parse(
        settings.base, settings.expert, settings.ordering, settings.gate_relu, settings.eos_from_tokenizer
    )
    checkpoint, problems = examine(
        arguments.directory, overrides=overrides, allow_outside=settings.allow_outside, inspect_base=_inspect_base
    )
    for problem in problems:
        print_error(problem)
    if checkpoint is None:
        return 1
    _skeleton().traversal_sites(checkpoint)
    sys.stdout.write(f"{describe(checkpoint).rstrip()}\n")
    if arguments.plan:
        _plan(checkpoint, arguments.directory, settings, gpu_bytes)
    return _verify(checkpoint, arguments.directory, settings) if arguments.verify else 0


def _inspect_base(base: BaseModel) -> Any:
    return _skeleton().inspect_base(base)


def _skeleton() -> ModuleType:
    """The module that asks transformers. It takes seconds to import: only when the files alone have shown no defect."""
    return importlib.import_module("service.model.loading.skeleton")


def _check_flags(arguments: argparse.Namespace, settings: Settings) -> None:
    """Raises SettingsError for flags that nothing would look at."""
    if not arguments.plan:
        for name in ("gpu_memory", *PLAN_FLAGS):
            flag = f"--{name.replace('_', '-')}"
            if getattr(arguments, name) is None or (name == "quantization" and arguments.verify):
                continue
            if name == "quantization":
                raise SettingsError(f"{flag} needs --plan or --verify", hint="check DIR without them loads no weights")
            raise SettingsError(f"{flag} needs --plan", hint="it changes only the memory plan")
    elif arguments.gpu_memory is not None and settings.device == "cpu":
        raise SettingsError("--gpu-memory does not go with --device cpu", hint="leave one of them out")
    elif settings.tensor_parallel > 1:
        raise SettingsError(
            f"--plan is for one process, and XLORA_TENSOR_PARALLEL is {settings.tensor_parallel}", hint="unset it"
        )


def _gpu_bytes(arguments: argparse.Namespace) -> int | None:
    """--gpu-memory in bytes. Raises SettingsError for what is no size."""
    if arguments.gpu_memory is None:
        return None
    try:
        size = parse_bytes(arguments.gpu_memory)
    except ValueError as error:
        raise SettingsError(f"--gpu-memory: {error}") from None
    assert isinstance(size, int)
    return size


def _plan(checkpoint: Checkpoint, directory: str, settings: Settings, gpu_bytes: int | None) -> None:
    """Prints the plan for the GPU that was described, or for the device that serve would take here."""
    loader, texts = map(importlib.import_module, ("service.engine.loader", "service.tools.memory_plan"))
    options = EngineOptions(
        model=directory,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_memory_bytes=settings.kv_memory,
        block_size=settings.block_size,
        quantization=settings.quantization,
    )
    if gpu_bytes is None:
        gpu_bytes = loader.free_device_bytes(loader.resolve_device(settings.device))
    found = loader.plan_for(checkpoint, options, gpu_bytes)
    sys.stdout.write(f"{texts.describe_plan(found)}\n")


def _verify(checkpoint: Checkpoint, directory: str, settings: Settings) -> int:
    """Prints the largest differences; 1 where they are more than rounding."""
    state, verification = map(importlib.import_module, ("service.api.state", "service.tools.verify"))
    options = replace(state.engine_options(settings), model=directory)
    with Console(stderr=True).status("loading") as status:
        found = verification.verify(checkpoint, options, status.update)
    verdict = "exact" if found.is_exact else "NOT exact" if found.is_judged else "not judged in half precision"
    note = f", {found.note}" if found.note else ""
    kind = found.dtype if settings.quantization is None else f"{settings.quantization}, {found.dtype}"
    ties = found.tokens - found.equal_tokens - found.other_tokens
    tokens = f"{found.equal_tokens} the same, {ties} near ties, {found.other_tokens} others"
    lines = (
        f"parity       with {found.source}{note}",
        f"             {found.tokens} greedy tokens on {found.device}, {kind}: {tokens}",
        f"             largest difference of logits {found.logits:.1e}, of scalings {found.scalings:.1e}: {verdict}",
    )
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if found.is_judged and not found.is_exact else 0
