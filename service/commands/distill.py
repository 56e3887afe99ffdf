"""xlora-serve distill DIR: teaches a bundle's scaling pass to draft what its real pass will say."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from service.checkpoint import Checkpoint, Overrides, load_checkpoint
from service.checkpoint.formats.writer import add_drafts
from service.checkpoint.weights.draft_layer import MAX_DEPTH
from service.cli import given_settings
from service.contract.errors import CheckpointError, SettingsError
from service.contract.options import EngineOptions
from service.model.loading.skeleton import inspect_base
from service.settings import Settings, load_settings
from service.tokenizer_files import open_tokenizer
from service.tools.distill import Distilled, Plan, distill, forwards_per_token

_LINE_SECONDS = 30.0  # between two lines of one kind of work


def run(arguments: argparse.Namespace) -> int:
    """Writes the draft head and the draft layer into the bundle, as far as they draft better than what it has."""
    settings = load_settings(given_settings(arguments))
    if arguments.depth > MAX_DEPTH + 1:
        raise SettingsError(f"--depth {arguments.depth}: expected at most {MAX_DEPTH + 1}")
    texts = read_prompts(Path(arguments.prompts))
    folder = Path(arguments.directory)
    plan = Plan(
        max_tokens=arguments.max_tokens,
        depth=arguments.depth,
        head_size=arguments.size,
        layer_size=arguments.layer_size,
        steps=arguments.steps,
    )
    with _work_folder(arguments.work) as work, _Bars() as bars:
        checkpoint = _load(folder, settings, bars)
        tokenizer = open_tokenizer(checkpoint.tokenizer_path)
        prompts = [tokenizer.encode(text).ids for text in texts]
        made = distill(checkpoint, _options(folder, settings), prompts, plan, work, bars)
    sys.stdout.write(table(made))
    if not made.helps:
        sys.stdout.write("nothing written: the bundle drafts as well as it is\n")
        return 0
    try:
        add_drafts(folder, made.head, made.layer)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    parts = [] if made.head is None else [f"a draft head, {made.head.size} wide"]
    if made.layer is not None:
        parts.append(f"a draft layer of depth {made.layer.depth}, {len(made.layer.up)} wide")
    sys.stdout.write(f"written to {folder}: {', '.join(parts)}\n")
    return 0


def _load(folder: Path, settings: Settings, bars: _Bars) -> Checkpoint:
    checkpoint = load_checkpoint(
        folder,
        overrides=Overrides.parse(settings.base, [], None),
        allow_outside=settings.allow_outside,
        inspect_base=inspect_base,
        on_progress=lambda line: bars(line, 0, 0),
    )
    if checkpoint.layout != "bundle" or not folder.is_dir():
        raise CheckpointError(f"{folder}: only a bundle can have a draft head", hint="xlora-serve convert makes one")
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"{folder}: cannot be written to", hint="work on a copy")
    return checkpoint


def _options(folder: Path, settings: Settings) -> EngineOptions:
    return EngineOptions(
        str(folder),
        base=settings.base,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        allow_outside=settings.allow_outside,
    )


@contextmanager
def _work_folder(given: str | None) -> Iterator[Path]:
    """The folder that was given, which stays, or one for this run only."""
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="xlora-distill-") as folder:
        yield Path(folder)


class _Bars:
    """A bar for each kind of work, on stderr; where that is no terminal, a line now and then."""

    def __init__(self) -> None:
        counts = TextColumn("{task.completed:,} of {task.total:,}")
        columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn(), counts)
        columns += (TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, disable=not self._is_terminal)
        self._task: TaskID | None = None
        self._kind = ""
        self._written_at = time.monotonic()

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, description: str, done: int, total: int) -> None:
        """Shows how far the work has come; `total` is 0 where nobody knows."""
        kind = description.partition(":")[0]
        if not self._is_terminal:
            self._write(kind, f"{description}, {done:,} of {total:,}" if total else description, is_counted=total > 0)
            return
        if self._task is None or kind != self._kind:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._kind = self._progress.add_task(description, total=total or 1), kind
        self._progress.update(self._task, description=description, completed=done, total=total or 1)

    def _write(self, kind: str, line: str, *, is_counted: bool) -> None:
        """Writes the line where it begins another kind of counted work, or nothing has been written for a while."""
        now = time.monotonic()
        begins = is_counted and kind != self._kind
        if begins or now - self._written_at >= _LINE_SECONDS:
            self._kind, self._written_at = kind, now
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def table(made: Distilled) -> str:
    """Agreement at each depth before and after, and what it is worth, as lines."""
    depth = max(len(shares) for shares in (made.before, made.after, made.trained))
    lines = [
        f"learned from {made.learned:,} positions, judged on {made.judged:,} others",
        "depth                  " + "".join(f"{number:>7}" for number in range(1, depth + 1)) + "   forwards per token",
    ]
    for name, shares in (("before", made.before), ("trained", made.trained), ("after", made.after)):
        cells = "".join(f"{share:7.3f}" for share in shares) + " " * 7 * (depth - len(shares))
        lines.append(f"agreement, {name:<12}{cells}   {forwards_per_token(shares):.3f}")
    return "\n".join([*lines, ""])


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
