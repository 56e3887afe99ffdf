"""Looks at what a field was given that cost little, however much it is: the kind and the number of its items.

Validation holds the event loop up, so that these come before any item is looked into.
"""

from __future__ import annotations

import math
from typing import TypeGuard, TypeVar

from pydantic import AfterValidator, BeforeValidator

_T = TypeVar("_T")

MAX_SCHEMA_VALUES = 1 << 15  # a schema that has more is over grammar_spec.MAX_SCHEMA_BYTES as well


def is_list_of(value: object, kind: type[_T]) -> TypeGuard[list[_T]]:
    """Whether it is a list of this very type alone; what an item costs is a fraction of a step of Python."""
    return isinstance(value, list) and set(map(type, value)) <= {kind}


def is_prompts(value: object, most: int) -> bool:
    """Whether it is a list of at most so many texts, or of lists of token ids."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return is_list_of(value, str) or (is_list_of(value, list) and all(is_list_of(ids, int) for ids in value))


def at_most(members: int) -> BeforeValidator:
    """An object with at most so many members: pydantic counts them only after it has looked into each."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > members:
            raise ValueError(f"has {len(value)} members; at most {members} are allowed")
        return value

    return BeforeValidator(check)


def check_finite(value: object) -> object:
    """A value that JSON can write. Raises ValueError where it holds NaN or infinity, as 1e999 is."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError("has a number that JSON does not have; the largest is 1.8e308")
        if isinstance(one, dict | list):
            pending.extend(one.values() if isinstance(one, dict) else one)
    return value


FINITE = AfterValidator(check_finite)


def check_schema_size(value: object) -> object:
    """A schema that is worth writing out, as grammar_spec.py does to see its bytes. Raises ValueError for another."""
    values, pending = 0, [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict | list):
            values += len(one)
            if values > MAX_SCHEMA_VALUES:
                raise ValueError(f"has more than {MAX_SCHEMA_VALUES} values at all depths")
            pending.extend(one.values() if isinstance(one, dict) else one)
    return value
