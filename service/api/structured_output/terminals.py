"""Terminals of the grammar: scalars and names, as expressions of llguidance's Lark."""

from __future__ import annotations

import json
from collections.abc import Iterable

from service.api.structured_output.number_regex import Range
from service.api.structured_output.pattern_regex import CHARACTER, literal

_EXACT_DIGITS = 15  # the library's bounds are doubles
MAX_EXACT = 10**_EXACT_DIGITS


def regex(expression: str) -> str:
    """An expression of `number_regex` or `pattern_regex`."""
    return "/" + expression.replace("/", "\\/") + "/"


def text(written: str) -> str:
    """Exactly this."""
    return json.dumps(written)


def string(value: str) -> str:
    """A string, in its quotes."""
    return text(literal(value))


def constant(value: bool | None) -> str:
    """null, true or false."""
    return text(json.dumps(value))


def number(value: int | float, integral: bool) -> str:
    """A number; every integer exactly."""
    return text(str(int(value)) if integral or isinstance(value, int) else json.dumps(value))


def multiples(numbers: Range, divisor: int) -> str | None:
    """The multiples of a divisor within a range of integers, as a rule; None where they are too large for one."""
    largest = 10 ** min(_EXACT_DIGITS, numbers.digits or _EXACT_DIGITS) - 1
    least = max(-largest, numbers.least if numbers.least is not None else -largest)
    most = min(largest, numbers.most if numbers.most is not None else largest)
    if -(-int(least) // divisor) * divisor > most:
        return None
    schema = {"type": "integer", "minimum": int(least), "maximum": int(most), "multipleOf": divisor}
    return "%json " + json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}})


def characters(least: int, most: int | None) -> str:
    """A string of so many characters."""
    return regex(f'"{CHARACTER}{{{least},{"" if most is None else most}}}"')


def any_of(parts: Iterable[str]) -> str:
    """Return the expression of texts that fit one of the parts."""
    found = list(dict.fromkeys(parts))
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def all_of(parts: Iterable[str]) -> str:
    """Return the expression of texts that fit all of the parts."""
    found = list(dict.fromkeys(parts))
    return found[0] if len(found) == 1 else f"({' & '.join(found)})"


def without(part: str, excluded: Iterable[str]) -> str:
    """Return the expression of texts that fit a part and nothing that is excluded."""
    found = list(excluded)
    return f"({part} & ~{any_of(found) if len(found) > 1 else f'({found[0]})'})" if found else part


def choice(parts: list[str]) -> str:
    """The grammar of texts that are one of the terminals, each by itself."""
    rules = [f"T{number}: {part}" for number, part in enumerate(parts)]
    return "\n".join([f"start: {' | '.join(f'T{number}' for number in range(len(parts)))}", *rules])
