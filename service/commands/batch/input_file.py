"""The file of prompts: a JSON object a line, each with an id, checked as a whole before anything is computed.

It is read twice, line by line, so that it may be larger than memory. This file knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from service.contract.errors import StartupError

OPENAI_KEY = "custom_id"  # of OpenAI's batch files, which has no other name for an id


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt of the file."""

    number: int  # from 1 on
    id: str | int
    fields: Mapping[str, Any]  # without the id

    @property
    def key(self) -> str:
        """The id as a text: 7 and "7" are the same to whoever looks an answer up."""
        return str(self.id)


class InputFile:
    """All lines of one file, with ids that differ."""

    def __init__(self, path: Path) -> None:
        """Raises StartupError, naming the line, for what is no object, for an id that is there twice, and for a mixture
        of formats; and for what can be read only once.
        """
        if path.exists() and not path.is_dir() and not path.is_file():
            raise StartupError(
                f"--prompts {path} is not a regular file", hint="save the prompts in a file: it is read twice"
            )
        self.path = path
        self.is_openai = False
        self.numbers: dict[str, int] = {}  # by key
        for place, line in enumerate(self.lines()):
            if line.key in self.numbers:
                self._fail(line.number, f"its id {line.id!r} is that of line {self.numbers[line.key]} already")
            if place == 0:
                self.is_openai = OPENAI_KEY in line.fields
            elif self.is_openai != (OPENAI_KEY in line.fields):
                self._fail(
                    line.number, f"{OPENAI_KEY!r} is in some lines and not in others", "use one format in a file"
                )
            self.numbers[line.key] = line.number
        if not self.numbers:
            raise StartupError(f"--prompts {path} has no prompts")

    def lines(self) -> Iterator[Line]:
        """The lines that are not blank, from the file. Raises StartupError as the constructor does."""
        try:
            with self.path.open("rb") as file:
                for number, text in enumerate(file, start=1):
                    if text.strip():
                        yield self._line(number, text)
        except OSError as error:
            raise StartupError(f"cannot read {self.path}: {(error.strerror or str(error)).lower()}") from None

    def _line(self, number: int, text: bytes) -> Line:
        try:
            fields = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            self._fail(number, f"it is no JSON: {error}", 'write one object a line, as {"prompt": "..."}')
        if not isinstance(fields, dict):
            self._fail(number, "it is no JSON object", 'write one object a line, as {"prompt": "..."}')
        name = OPENAI_KEY if OPENAI_KEY in fields else "id"
        id = fields.get(name)
        if id is not None and (not isinstance(id, str | int) or isinstance(id, bool)):
            self._fail(number, f"its {name} is {id!r:.60}; it must be a text or an integer")
        if isinstance(id, int) and not -(1 << 63) <= id < 1 << 63:
            self._fail(number, f"its {name} has more than 64 bits", "write it as a text")
        if isinstance(id, str) and not _is_unicode(id):
            self._fail(number, f"its {name} {id!r:.60} has a lone surrogate")
        if name == "id":
            fields = {field: value for field, value in fields.items() if field != "id"}
        return Line(number, number if id is None else id, fields)

    def _fail(self, number: int, reason: str, hint: str | None = None) -> NoReturn:
        raise StartupError(f"{self.path}, line {number}: {reason}", hint=hint)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
