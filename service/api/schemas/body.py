"""Request bodies at every depth are strict, closed, and read for what they say alone.

A known field that is null or empty is absent, as if it had not been sent, but where such a value has a meaning of its
own (`null_is_meant`, `meant`). An unknown field is an error, and so is one that OpenAI has and this server has not
(`unsupported`), unless it says nothing. This file knows no fields.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

# The types of validation errors about a field of the object at hand; their context has its `name`.
UNKNOWN_FIELD = "unknown_field"
UNSUPPORTED_FIELD = "unsupported_field"
MISSING_FIELD = "missing_field"

_EMPTY: Mapping[type, Mapping[str, Any]] = {
    str: {"type": "string", "maxLength": 0},
    list: {"type": "array", "maxItems": 0},
    dict: {"type": "object", "maxProperties": 0},
}
_ALL: frozenset[type] = frozenset(_EMPTY)
_NONE: frozenset[type] = frozenset()
_FILLED = frozenset({"minLength", "minItems", "enum", "const", "pattern"})  # keywords that an empty value may not fit


class Body(BaseModel):
    """Strict, closed, finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    null_is_meant: ClassVar[bool] = False  # of all fields
    meant: ClassVar[frozenset[str]] = frozenset()  # the fields whose empty value says something
    any_empty: ClassVar[frozenset[str]] = frozenset()  # the lists for which clients also send "" and {}
    # OpenAI's fields that this server has not, each with the values, besides null and empty, that say nothing.
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    instead: ClassVar[Mapping[str, str]] = {}  # what to do in place of some of them

    @model_validator(mode="before")
    @classmethod
    def _what_is_said(cls, value: Any) -> Any:
        """Names the first field that is not known, where pydantic makes an error of each, after all others."""
        if not isinstance(value, dict):
            return value
        known = field_names(cls)
        if not value.keys() <= known:
            value = {name: item for name, item in value.items() if name in known or not cls._says_nothing(name, item)}
        kinds = _empty_kinds(cls)
        return {name: item for name, item in value.items() if not cls._is_absent(item, kinds.get(name, _NONE))}

    @classmethod
    def _is_absent(cls, value: Any, kinds: frozenset[type]) -> bool:
        return not cls.null_is_meant if value is None else not value and type(value) in kinds

    @classmethod
    def _says_nothing(cls, name: str, value: Any) -> bool:
        """Of a field that is none of ours. Raises PydanticCustomError where it says something."""
        if name not in cls.unsupported:
            raise PydanticCustomError(UNKNOWN_FIELD, "unknown field", {"name": name})
        kinds = _NONE if name in cls.meant else _ALL
        if not cls._is_absent(value, kinds) and value not in cls.unsupported[name]:
            raise PydanticCustomError(UNSUPPORTED_FIELD, "not supported", {"name": name, "hint": cls.instead.get(name)})
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

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Says of each field that it may be empty, where its own schema does not."""
        schema = handler.resolve_ref_schema(handler(core))
        for name, kinds in _empty_kinds(cls).items():
            ways = schema["properties"][name].get("anyOf", [])
            ways += [
                _EMPTY[kind] for kind in _EMPTY if kind in kinds and not any(_may_be_empty(one, kind) for one in ways)
            ]
        return schema


@functools.cache
def field_names(model: type[BaseModel]) -> frozenset[str]:
    """The names that a model's fields have in JSON."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


@functools.cache
def _empty_kinds(model: type[Body]) -> Mapping[str, frozenset[type]]:
    """By the names of fields that may be absent: the kinds of values that are absent when they are empty. What a field
    never takes is refused, also when it is empty.
    """
    fields = {field.alias or name: field for name, field in model.model_fields.items() if not field.is_required()}
    return {
        name: _ALL if name in model.any_empty else _kinds(field.annotation)
        for name, field in fields.items()
        if name not in model.meant
    }


def _kinds(annotation: Any) -> frozenset[type]:
    """Which of text, list and object a field takes."""
    origin = get_origin(annotation) or annotation
    if origin is Any:
        return _ALL
    if origin is Literal:
        return frozenset(map(type, get_args(annotation))) & _ALL
    if isinstance(origin, type) and issubclass(origin, Body):
        return frozenset({dict})
    if origin in _ALL:
        return frozenset({origin})
    return frozenset().union(*map(_kinds, get_args(annotation)))


def _may_be_empty(schema: Mapping[str, Any], kind: type) -> bool:
    return schema.get("type") == _EMPTY[kind]["type"] and schema.keys().isdisjoint(_FILLED)


def absent_at(neutral: int) -> AfterValidator:
    """A number that says no more than null does, where others use it to switch something off."""
    return AfterValidator(lambda value: None if value == neutral else value)
