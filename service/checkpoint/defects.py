"""How a defect is worded and whether reading goes on after one.

Knows nothing about what is being read. `defect` makes every message one line that begins with the file; `Defects`
either raises the first defect (loading) or keeps all of them (`xlora-serve check`), so both walk the same code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from service.errors import CheckpointError


def one_line(text: str) -> str:
    """Escape line breaks and control characters: names inside damaged files may hold anything."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def defect(file: Path | str, problem: str, hint: str | None = None) -> CheckpointError:
    """A CheckpointError that reads `file: problem (hint: ...)` on one line."""
    return CheckpointError(one_line(f"{file}: {problem}"), hint=one_line(hint) if hint else None)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint with the closest known names, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in matches)}?" if matches else None


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """`'a', 'b', 'c' and 4 more`, for messages about many names."""
    listed = list(names)
    text = ", ".join(repr(name) for name in listed[:limit])
    return text if len(listed) <= limit else f"{text} and {len(listed) - limit} more"


class Defects:
    """Receives defects. With `keep_going` they pile up in `errors`; without, the first one is raised."""

    def __init__(self, *, keep_going: bool = False) -> None:
        self.keep_going = keep_going
        self.errors: list[CheckpointError] = []

    def add(self, error: CheckpointError) -> None:
        """Record one defect, or raise it."""
        if not self.keep_going:
            raise error
        self.errors.append(error)

    def guard(self) -> Self:
        """`with defects.guard():` runs one independent step; when a defect ends it, the steps after it still run."""
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, OSError):  # permission denied, name too long, a disk that fails
            self.add(defect(error.filename or "bundle", f"not readable: {error.strerror or error}"))
        elif isinstance(error, CheckpointError):
            self.add(error)
        return isinstance(error, OSError | CheckpointError)
