"""Defects: their wording, and whether reading continues after one.

Knows nothing about what is being read. `defect` makes every message one line that begins with the file; `Defects`
either raises the first defect (loading) or collects all of them (`xlora-serve check`), so both run the same code.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import Self

from service.contract.errors import CheckpointError, XLoraError

MAX_MESSAGE = 2000  # characters: a name inside a damaged file may be megabytes long
MAX_DEFECTS = 100  # of one checkpoint: beyond, their kind matters and not their number
MAX_KNOWN = 10_000  # names that a hint is chosen from; with more, there is no hint
MAX_COMPARED = 100  # of those, the ones most like the name: comparing one costs a tenth of a millisecond


class TooManyDefects(CheckpointError):
    """There are more than MAX_DEFECTS defects; reading ends."""


def one_line(text: str) -> str:
    """Escape line breaks and control characters: names inside damaged files may hold anything."""
    text = text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]}...{text[-MAX_MESSAGE // 2 :]}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def defect(file: Path | str, problem: str, hint: str | None = None) -> CheckpointError:
    """A CheckpointError that reads `file: problem (hint: ...)` on one line."""
    return CheckpointError(one_line(f"{file}: {problem}"), hint=one_line(hint) if hint else None)


@contextmanager
def naming(file: Path | str, problem: str, hint: str | None = None) -> Iterator[None]:
    """Turns any exception of a library into a defect of `file`: `problem`, then the library's message."""
    try:
        yield
    except (XLoraError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        # the message of a RecursionError depends on where the stack was full
        said = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise defect(file, f"{problem}: {type(error).__name__}: {said:.300}", hint) from error


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint with the closest known names, or None when nothing is close."""
    names = list(known)
    if len(names) > MAX_KNOWN or len(name) > MAX_MESSAGE:
        return None
    related = heapq.nlargest(MAX_COMPARED, names, key=lambda other: _shared_ends(name, other))
    matches = difflib.get_close_matches(name, related, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in matches)}?" if matches else None


def _shared_ends(first: str, second: str) -> int:
    """The number of characters that two names have in common at the beginning and at the end."""
    ends = commonprefix([first[::-1], second[::-1]])  # noqa: RUF071 (by characters is meant)
    return len(ends) + len(commonprefix([first, second]))  # noqa: RUF071


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """`'a', 'b', 'c' and 4 more`, for messages about many names."""
    listed = list(names)
    text = ", ".join(repr(name) for name in listed[:limit])
    return text if len(listed) <= limit else f"{text} and {len(listed) - limit} more"


class Defects:
    """Receives defects. With `keep_going` they are collected in `errors`; without, the first one is raised."""

    def __init__(self, *, keep_going: bool = False) -> None:
        self.keep_going = keep_going
        self.errors: list[CheckpointError] = []
        self.warnings: list[str] = []

    def add(self, error: CheckpointError) -> None:
        """Record one defect, or raise it."""
        if not self.keep_going:
            raise error
        self.errors.append(error)
        if len(self.errors) == MAX_DEFECTS:
            raise TooManyDefects(f"more than {MAX_DEFECTS - 1} defects: the rest is not looked at")

    def warn(self, file: Path | str, text: str) -> None:
        """Records an oddity that is no defect, but that the operator should know of; the first MAX_DEFECTS."""
        if len(self.warnings) < MAX_DEFECTS:
            self.warnings.append(one_line(f"{file}: {text}"))

    def guard(self) -> Self:
        """`with defects.guard():` runs one independent part; when a defect ends it, later parts still run."""
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, TooManyDefects):
            return False
        if isinstance(error, OSError):  # permission denied, name too long, a disk that fails
            self.add(defect(error.filename or "bundle", f"not readable: {error.strerror or error}"))
        elif isinstance(error, CheckpointError):
            self.add(error)
        return isinstance(error, OSError | CheckpointError)
