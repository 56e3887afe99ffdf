"""The file of answers: a line for each prompt, in the order in which they came, and what is there of an earlier run.

A line is written at once, after the answer is whole: who is killed loses no line that is there, and leaves at most the
beginning of one. This file knows no engine.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Self

import orjson

from service.contract.errors import StartupError


class OutputFile:
    """One file, held against other processes from construction to `close`."""

    def __init__(
        self, path: Path, key: str, known: Collection[str], is_answer: Callable[[Mapping[str, Any]], bool | None]
    ) -> None:
        """Opens the file, and keeps the lines of an earlier run that are whole and no errors. `key` is the field of the
        id, `known` are the ids of the prompts as texts; `is_answer` is False for an error, and None for what is
        neither.

        Raises StartupError for a file that another process holds, for one that has other lines than this command
        would write, and for what is no regular file: a run could not go on from it.
        """
        self.path = path
        self.done: set[str] = set()
        self._key = key
        self._known = known
        self._is_answer = is_answer
        self._held: list[BinaryIO] = []
        if path.exists() and not path.is_dir() and not path.is_file():
            raise StartupError(
                f"--output {path} is not a regular file", hint="name a file, from which a later run can continue"
            )
        try:
            self._file = self._take(path)
            self._keep_what_is_good()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise _cannot_write(path, error) from None
            raise

    def write(self, line: bytes) -> None:
        """Appends one line, which ends with a line feed. Raises StartupError where it cannot be."""
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def close(self) -> None:
        for file in self._held:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, path: Path) -> BinaryIO:
        """Opens a file for appending, unbuffered, and locks it."""
        file = path.open("a+b", buffering=0)
        self._held.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(f"another process is writing {path}", hint="wait until it has ended") from None
        return file

    def _keep_what_is_good(self) -> None:
        """Drops errors and the beginning of a line. Where that is more than an end, another file takes this one's
        place: a kill loses nothing.
        """
        good, total = 0, 0
        is_prefix = True  # whether all that is dropped stands behind all that is kept
        for line, keep in self._judged():
            total += len(line)
            is_prefix = is_prefix and (not keep or good == total - len(line))
            good += len(line) if keep else 0
        if is_prefix:
            self._file.truncate(good)
            self._end_line(good)
            return
        other = self.path.with_name(self.path.name + ".new")
        other.unlink(missing_ok=True)
        self.done.clear()
        new = self._take(other)
        with self.path.open("rb") as old:
            for line, keep in self._judged(old):
                if keep:
                    new.write(line.rstrip(b"\n") + b"\n")
        os.replace(other, self.path)
        self._file = new

    def _end_line(self, size: int) -> None:
        """The last line may lack its end, where somebody has edited the file."""
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def _judged(self, file: BinaryIO | None = None) -> Iterator[tuple[bytes, bool]]:
        """Every line, and whether it stays."""
        with self.path.open("rb") if file is None else file as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    document = decoded(line)
                except ValueError:
                    if line.endswith(b"\n") and line.strip():
                        self._fail(number, "is no JSON")
                    yield line, False
                    continue
                yield line, self._is_good(number, document)

    def _is_good(self, number: int, document: Any) -> bool:
        if not isinstance(document, dict) or self._key not in document:
            self._fail(number, f"has no {self._key!r}")
        id = str(document[self._key])
        if id not in self._known:
            self._fail(number, f"has the id {id!r:.60}, which none of the prompts has")
        answered = self._is_answer(document)
        if answered is None:
            self._fail(number, "has neither an answer of this command nor an error")
        if id in self.done or not answered:
            return False
        self.done.add(id)
        return True

    def _fail(self, number: int, reason: str) -> NoReturn:
        raise StartupError(
            f"{self.path}, line {number} {reason}: it was not written for these prompts",
            hint="choose another --output, or remove the file",
        )


def encoded(document: Mapping[str, Any]) -> bytes:
    """One line of output."""
    try:
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a lone surrogate in a name that the caller has sent
        return json.dumps(document).encode() + b"\n"


def decoded(line: bytes) -> Any:
    """The object that `encoded` has written. Raises ValueError for text that is not JSON."""
    try:
        return orjson.loads(line)
    except ValueError:  # a lone surrogate
        return json.loads(line)


def _cannot_write(path: Path, error: OSError) -> StartupError:
    return StartupError(f"cannot write {path}: {(error.strerror or str(error)).lower()}")
