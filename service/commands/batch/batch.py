"""A file of prompts to a file of answers, with a progress bar; what is there already is not computed again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from service.commands.batch.formats import Format, Result
from service.commands.batch.input_file import InputFile, Line
from service.commands.batch.output_file import OutputFile
from service.commands.local import local_session
from service.contract.errors import RequestError, SettingsError
from service.library.feed import as_they_come
from service.library.progress import bar


def check_flags(
    arguments: argparse.Namespace, with_prompt: tuple[str, ...] = (), with_file: tuple[str, ...] = ()
) -> None:
    """Raises SettingsError for flags that nothing would look at: those in `with_prompt` go with --prompt alone, and
    --output and those in `with_file` with --prompts.
    """
    is_file = arguments.prompts is not None
    for name in with_prompt if is_file else ("output", *with_file):
        if getattr(arguments, name) is not None:
            given, wanted = ("--prompts", "--prompt TEXT") if is_file else ("--prompt", "--prompts FILE")
            raise SettingsError(f"--{name} does not go with {given}", hint=f"it needs {wanted}")
    if not is_file:
        return
    if arguments.output is None:
        raise SettingsError("--prompts needs --output", hint="name the file that the answers are written to")
    if Path(arguments.output).resolve() == Path(arguments.prompts).resolve():
        raise SettingsError("--output and --prompts name the same file", hint="choose another --output")


def run_batch(
    arguments: argparse.Namespace, prompts: InputFile, path: Path, format: Format, done: frozenset[str] = frozenset()
) -> int:
    """Answers all prompts that have no answer yet, here or among the ids in `done`. Returns how many have failed."""
    with OutputFile(path, format.key, prompts.numbers, format.is_answer) as output:
        left = prompts.numbers.keys() - output.done - done
        if not left:
            _say(f"all {len(prompts.numbers)} prompts are answered already")
            return 0
        if len(left) < len(prompts.numbers):
            _say(f"{len(prompts.numbers) - len(left)} of {len(prompts.numbers)} prompts are answered already")
        return _answer(arguments, prompts, output, format, left)


def _answer(
    arguments: argparse.Namespace, prompts: InputFile, output: OutputFile, format: Format, left: set[str]
) -> int:
    answered, failed, first = 0, 0, None
    with local_session(arguments) as (loop, session):

        def begin(line: Line) -> Future[Result]:
            return loop.submit(format.answer(session, line))

        wanted: Iterator[Line] = (line for line in prompts.lines() if line.key in left)
        before = len(prompts.numbers) - len(left)
        try:
            with bar("prompts", len(prompts.numbers), done=before) as shown:
                for result in as_they_come(begin, wanted, session.window):
                    output.write(result.line)
                    answered += 1
                    failed += result.error is not None
                    first = first or result.error
                    shown.advance(result.tokens)
        finally:
            _report(answered, failed, len(left), first)
    return failed


def _report(answered: int, failed: int, wanted: int, first: RequestError | None) -> None:
    if answered < wanted:
        _say(f"stopped after {answered} of {wanted} prompts; the same command goes on from there")
    if first is not None:
        _say(f"{failed} of {answered} prompts have failed, one with: {first}")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
