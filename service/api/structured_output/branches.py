"""Values that a conjunction of schemas allows, by type, and whether there is any. Knows no schema and no grammar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Conjunction = tuple[int, ...]  # every one of these schemas; none of them: any value


@dataclass(frozen=True)
class Scalar:
    """A null, booleans, numbers or strings, as a terminal or, where it cannot be one, a rule."""

    kind: str
    text: str
    is_terminal: bool = True


@dataclass(frozen=True)
class Array:
    """Items: those at the beginning, and all that follow."""

    prefix: list[Conjunction]
    tail: Conjunction
    least: int
    most: int | None


@dataclass(frozen=True)
class Object:
    """Properties: those with names, in order, and others by the terminals of their names."""

    named: dict[str, Conjunction]
    required: frozenset[str]
    others: list[tuple[str, Conjunction]]
    least: int
    most: int | None


Branch = Scalar | Array | Object


def needed(branch: Branch) -> list[Conjunction]:
    """The parts that decide whether some value fits a branch."""
    if isinstance(branch, Array):
        return _first_items(branch)
    if isinstance(branch, Object):
        if branch.least <= len(branch.required):
            return [branch.named[name] for name in branch.required]
        return [*branch.named.values(), *(part for _, part in branch.others)]
    return []


def holds(branch: Branch, fits: Callable[[Conjunction], bool]) -> bool:
    """Whether some value fits a branch, where that is known of its parts."""
    if isinstance(branch, Scalar):
        return True
    if branch.most is not None and branch.most < branch.least:
        return False
    if isinstance(branch, Array):
        return all(map(fits, _first_items(branch)))
    if not all(fits(branch.named[name]) for name in branch.required):
        return False
    if branch.least <= len(branch.required):
        return True
    different = sum(map(fits, branch.named.values())) + any(fits(part) for _, part in branch.others)
    return different >= branch.least


def _first_items(array: Array) -> list[Conjunction]:
    """The parts that there must be, each kind once."""
    return [*array.prefix, array.tail] if array.least > len(array.prefix) else array.prefix[: array.least]
