"""A command line's parser that answers a wrong word with the nearest right one. Knows argparse, and no flag of ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from service.contract.spelling import likely

_WRONG_USAGE = 2
_FLAG = "--"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are its own usage, one line, and a hint. Give subparsers the same class."""

    def __init__(self, *arguments: Any, flags_of_others: Mapping[str, str] | None = None, **named: Any) -> None:
        """`flags_of_others` has flags of similar programs, each with a hint."""
        super().__init__(*arguments, **named)
        self.flags_of_others = flags_of_others or {}
        self.siblings: Mapping[str, argparse.ArgumentParser] = {}  # of a command: all commands by name

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, after unknown words have been refused: argparse would first ask for what is missing."""
        words = list(sys.argv[1:] if args is None else args)
        for word in _flags(words, before_command=bool(self.commands())):
            if not self._is_known(word):
                self.fail(f"unknown flag {word}", self._hint(word))
        self._check_command(words)
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            self._refuse(rest)
        return namespace, rest

    def _is_known(self, word: str) -> bool:
        """Whether argparse takes this flag, whole or abbreviated."""
        if word in self.flags_of_others and word not in self._option_string_actions:
            return False
        return any(known.startswith(word) for known in self._option_string_actions)

    def _refuse(self, rest: Sequence[str]) -> NoReturn:
        is_model = "--model" in self._option_string_actions and not rest[0].startswith("-")
        hint = f"--model {rest[0]} names a model" if is_model else f"{self.prog} --help explains the arguments"
        self.fail(f"unknown argument {rest[0]!r}", hint)

    def error(self, message: str) -> NoReturn:
        known = ", ".join(self.commands())
        self.fail(message, f"the commands are {known}" if known else f"{self.prog} --help explains every flag")

    def fail(self, message: str, hint: str) -> NoReturn:
        """Exits with 2 after the usage, the message and the hint."""
        self.print_usage(sys.stderr)
        self.exit(_WRONG_USAGE, f"error: {message}\nhint: {hint}\n")

    def commands(self) -> Mapping[str, argparse.ArgumentParser]:
        """The subparsers by name; empty for a command."""
        actions = self._subparsers._group_actions if self._subparsers else []
        return next((action.choices for action in actions if isinstance(action.choices, dict)), {})

    def _check_command(self, words: Sequence[str]) -> None:
        known = self.commands()
        word = next((word for word in words if not word.startswith("-")), None)
        if known and word is not None and word not in known:
            close = likely(word, known)
            hint = f"did you mean {self.prog} {close}?" if close else f"the commands are {', '.join(known)}"
            self.fail(f"unknown command {word!r}", hint)

    def _hint(self, word: str) -> str:
        if word in self.flags_of_others:
            return self.flags_of_others[word]
        known = [flag for flag in self._option_string_actions if flag.startswith(_FLAG)]
        name = word.removeprefix(_FLAG).removeprefix("enable-").replace("_", "-")
        if f"--no-{name}" in known:
            return f"it is on without a flag; --no-{name} switches it off"
        having = [name for name, parser in self.siblings.items() if word in parser._option_string_actions]
        if having:
            return f"{word} is a flag of {', '.join(having)}, and follows the command"
        close = likely(word, known) or _with_its_words(name, known)
        return f"did you mean {close}?" if close else f"{self.prog} --help lists the flags"


def _with_its_words(name: str, known: Sequence[str]) -> str | None:
    """The one flag that has all words of a name and more, as --max-num-seqs has those of --max-seqs, or the one of
    several words that is a part of it.
    """
    words = set(name.split("-"))
    sets = {flag: set(flag.removeprefix(_FLAG).split("-")) for flag in known}
    found = [flag for flag, its in sets.items() if (len(words) > 1 and words < its) or (len(its) > 1 and words > its)]
    return found[0] if len(found) == 1 else None


def _flags(words: Sequence[str], *, before_command: bool) -> Iterator[str]:
    """The words that argparse takes for flags, without their values; a word with a space is none."""
    for word in words:
        if word == _FLAG or (before_command and not word.startswith("-")):
            return
        name = word.partition("=")[0]
        if name.startswith(_FLAG) and " " not in name:
            yield name
