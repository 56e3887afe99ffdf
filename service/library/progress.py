"""A progress bar with tokens per second and the time that is left, in a terminal or in a notebook.

In a notebook it is an HTML element of its own: rich's would need ipywidgets.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_T = TypeVar("_T")
_SHOWN_SECONDS = 0.1  # between two pictures in a notebook


class Bar(Protocol):
    """Something that shows how far the work has come."""

    def advance(self, tokens: int, done: int = 1) -> None:
        """So many more prompts are done, and so many tokens generated or read."""


class _TerminalBar:
    def __init__(self, progress: Progress, name: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, speed="")
        self._speed = _Speed()

    def advance(self, tokens: int, done: int = 1) -> None:
        self._progress.update(self._task, advance=done, speed=self._speed.text(tokens))


class _NotebookBar:
    """One line of HTML that is replaced."""

    def __init__(self, name: str, total: int | None) -> None:
        display = importlib.import_module("IPython.display")  # it is there where a notebook is
        self._html = display.HTML
        self._name, self._total, self._done = name, total, 0
        self._speed = _Speed()
        self._shown = time.monotonic()
        self._handle = display.display(self._html(self._picture("")), display_id=True)

    def advance(self, tokens: int, done: int = 1) -> None:
        self._done += done
        speed, now = self._speed.text(tokens), time.monotonic()
        if now - self._shown >= _SHOWN_SECONDS or self._done == self._total:
            self._shown = now
            self._handle.update(self._html(self._picture(speed)))

    def _picture(self, speed: str) -> str:
        value = "" if self._total is None else f' value="{self._done}" max="{self._total}"'
        of = "" if self._total is None else f" of {self._total}"
        left = self._speed.seconds_left(self._done, self._total)
        time_left = "" if left is None else f", {left:.0f} s left"
        return f"{self._name} <progress{value}></progress> {self._done}{of} {speed}{time_left}"


class _Speed:
    """Tokens per second since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._tokens = 0

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-6)

    def text(self, tokens: int) -> str:
        self._tokens += tokens
        return f"{self._tokens / self._seconds:,.0f} tokens/s"

    def seconds_left(self, done: int, total: int | None) -> float | None:
        return None if total is None or not done else self._seconds / done * (total - done)


@contextmanager
def bar(name: str, total: int | None, *, done: int = 0) -> Iterator[Bar]:
    """A bar for the length of the block; `total` is None where nobody knows it, `done` of it are done already."""
    console = Console(stderr=True)
    if console.is_jupyter:
        notebook = _NotebookBar(name, None if total is None else total - done)
        yield notebook
    else:
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn()),
        )
        with Progress(*columns, console=console) as progress:
            terminal = _TerminalBar(progress, name, total)
            progress.update(progress.task_ids[0], completed=done)
            yield terminal


def watched(answers: Iterable[_T], name: str, total: int | None) -> Iterator[_T]:
    """The answers, with a bar beside them."""
    with bar(name, total) as shown:
        for answer in answers:
            shown.advance(tokens_of(answer))
            yield answer


def tokens_of(answer: Any) -> int:
    """The tokens that an answer of any kind has generated, or read where nothing is generated."""
    if hasattr(answer, "usage"):
        return int(answer.usage["completion_tokens"])
    return len(getattr(answer, "token_ids", ()))
