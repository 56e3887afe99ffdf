"""xlora-serve distill DIR: teaches a bundle's scaling pass to draft what its real pass will say."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from service.checkpoint import Overrides, load_checkpoint
from service.checkpoint.formats.writer import add_drafts
from service.cli import given_settings
from service.contract.errors import CheckpointError, SettingsError
from service.contract.options import EngineOptions
from service.model.loading.skeleton import inspect_base
from service.settings import load_settings
from service.tokenizer_files import open_tokenizer
from service.tools.distill import distill


def run(arguments: argparse.Namespace) -> int:
    """Writes the draft head into the bundle, unless the bundle drafts as well without: then 1."""
    settings = load_settings(given_settings(arguments))
    texts = read_prompts(Path(arguments.prompts))
    folder = Path(arguments.directory)
    with Console(stderr=True).status(f"reading {folder}") as status:
        checkpoint = load_checkpoint(
            folder,
            overrides=Overrides.parse(settings.base, [], None),
            allow_outside=settings.allow_outside,
            inspect_base=inspect_base,
            on_progress=status.update,
        )
        if checkpoint.layout != "bundle" or not folder.is_dir():
            raise CheckpointError(
                f"{folder}: only a bundle can have a draft head", hint="xlora-serve convert makes one"
            )
        if not os.access(folder, os.W_OK):
            raise CheckpointError(f"{folder}: cannot be written to", hint="work on a copy")
        tokenizer = open_tokenizer(checkpoint.tokenizer_path)
        options = EngineOptions(
            str(folder),
            base=settings.base,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads,
            allow_outside=settings.allow_outside,
        )
        made = distill(
            checkpoint,
            options,
            [tokenizer.encode(text).ids for text in texts],
            max_tokens=arguments.max_tokens,
            size=arguments.size,
            on_progress=status.update,
        )
    found = f"on {made.judged:,} others, drafts that come true {made.before:.3f} -> {made.after:.3f}"
    sys.stdout.write(f"draft head   {made.weights.size} wide, learned from {made.positions:,} positions; {found}\n")
    if made.after <= made.before:
        sys.stdout.write("nothing written: the bundle drafts as well as it is\n")
        return 1
    try:
        add_drafts(folder, made.weights, None)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    sys.stdout.write(
        f"             written to {folder}; forwards per token {2 - made.before:.2f} -> {2 - made.after:.2f}\n"
    )
    return 0


def read_prompts(path: Path) -> list[str]:
    """A prompt a line, as plain text, or as JSON Lines with `prompt` where the first one is an object. Raises
    SettingsError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--prompts {path}: {error}") from error
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return [line for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)["prompt"] if line.strip() else None
        except (ValueError, KeyError, TypeError):
            prompt = 0
        if isinstance(prompt, str) and prompt:
            prompts.append(prompt)
        elif prompt is not None:
            raise SettingsError(
                f'--prompts {path}, line {number}: expected an object with a text "prompt", found {line:.60}'
            )
    return prompts
