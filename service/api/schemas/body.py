"""What every request body is, at every depth: strict, closed, and read for what it says alone.

A known field that is null or empty is absent, as if it had not been sent, but where such a value has a meaning of its
own (`null_is_meant`, `meant`). An unknown field is an error, and so is one that OpenAI has and this server has not
(`unsupported`), unless it says nothing. This file knows no fields.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

# The types of validation errors about a field of the object at hand; their context has its `name`.
UNKNOWN_FIELD = "unknown_field"
UNSUPPORTED_FIELD = "unsupported_field"
MISSING_FIELD = "missing_field"


class Body(BaseModel):
    """Strict, closed, finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    null_is_meant: ClassVar[bool] = False  # of all fields
    meant: ClassVar[frozenset[str]] = frozenset()  # the fields whose empty value says something
    # OpenAI's fields that this server has not, each with the values, besides null and empty, that say nothing.
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _what_is_said(cls, value: Any) -> Any:
        """Names the first field that is not known, where pydantic makes an error of each, after all others."""
        if not isinstance(value, dict):
            return value
        known = field_names(cls)
        if not value.keys() <= known:
            value = {name: item for name, item in value.items() if name in known or not cls._says_nothing(name, item)}
        kept = cls.meant | _required_names(cls)
        return {name: item for name, item in value.items() if not cls._is_absent(item, name in kept)}

    @classmethod
    def _is_absent(cls, value: Any, empty_is_meant: bool) -> bool:
        if value is None:
            return not cls.null_is_meant
        return not value and not empty_is_meant and isinstance(value, str | list | dict)

    @classmethod
    def _says_nothing(cls, name: str, value: Any) -> bool:
        """Of a field that is none of ours. Raises PydanticCustomError where it says something."""
        if name not in cls.unsupported:
            raise PydanticCustomError(UNKNOWN_FIELD, "unknown field", {"name": name})
        if not cls._is_absent(value, name in cls.meant) and value not in cls.unsupported[name]:
            raise PydanticCustomError(UNSUPPORTED_FIELD, "not supported", {"name": name})
        return True

    @model_validator(mode="after")
    def _empty_objects_are_absent(self) -> Body:
        """An object in which nothing is said, as {"top_k": null}."""
        for name in list(self.model_fields_set):
            value = getattr(self, name)
            if isinstance(value, Body) and not value.model_fields_set:
                setattr(self, name, None)
                self.model_fields_set.discard(name)
        return self


@functools.cache
def field_names(model: type[BaseModel]) -> frozenset[str]:
    """The names that a model's fields have in JSON."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


@functools.cache
def _required_names(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items() if field.is_required())


def absent_at(neutral: int) -> AfterValidator:
    """A number that says no more than null does, where others use it to switch something off."""
    return AfterValidator(lambda value: None if value == neutral else value)


# Of a field that is a number here, and a switch elsewhere.
FALSE_IS_ABSENT = BeforeValidator(lambda value: None if value is False else value)
