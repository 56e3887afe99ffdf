"""What an answer must be that calls a function: the form of its text, from the functions it may call.

A call of one function is the JSON of its arguments. Where there are several to choose among, it is an object with the
name and the arguments; tool_calls.py reads both. Objects whose schema lists properties, and does not say whether they
may have others, have none: a function could not take them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from service.api.schemas.fields import JsonSchema, ResponseFormat
from service.api.schemas.tools import Function
from service.api.structured_output.grammar_spec import TextForms
from service.contract.errors import InvalidRequestError
from service.contract.request import TextForm

NAME, ARGUMENTS = "name", "arguments"  # of a call among several, in this order

_FORMAT = "response_format"
_SCHEMA = f"{_FORMAT}.json_schema.schema"
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")  # keywords whose value is a list of schemas ...
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # ... or schemas by name ...
_VALUES = ("const", "enum", "default", "examples")  # ... or no schema, whatever it looks like
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
_OPENING = ("additionalProperties", "patternProperties", "minProperties", "propertyNames", "unevaluatedProperties")


async def tool_form(forms: TextForms, functions: Mapping[int, Function]) -> TextForm:
    """The form of a call of one of the functions, given by their places in `tools`. Raises InvalidRequestError for
    parameters that cannot be enforced, naming them.
    """
    schemas = {place: _parameters(place, function) for place, function in functions.items()}
    if len(schemas) == 1:
        [(place, schema)] = schemas.items()
        return await _form(forms, place, schema)
    names = {place: function.name for place, function in functions.items()}
    try:
        return await _judged(forms, _format({"anyOf": list(_calls(names, schemas))}))
    except InvalidRequestError as error:
        for place, schema in schemas.items():
            await _form(forms, place, schema)  # one of them alone is at fault, or all together are too large
        raise _renamed(error, "tools") from None


def _parameters(place: int, function: Function) -> dict[str, Any]:
    """The schema of a function's arguments."""
    param = f"tools[{place}].function.parameters"
    stated = function.parameters
    if stated is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    kind = stated.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequestError(
            f'`{param}.type` is {kind!r:.60}; arguments are an object: "object"', param=f"{param}.type"
        )
    schema = {**copy.deepcopy(stated), "type": "object"}
    if not any(_is_composed(one) for one in _schemas(schema)):
        for one in _schemas(schema):
            if _lists_its_properties(one):
                one["additionalProperties"] = False
    return schema


def _calls(names: Mapping[int, str], schemas: Mapping[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The schema of each call: its arguments' references are those of a schema that is no longer the whole."""
    for number, (place, alone) in enumerate(schemas.items()):
        schema = copy.deepcopy(alone)
        schema.pop("$id", None)  # references begin at the whole
        root = f"#/anyOf/{number}/properties/{ARGUMENTS}"
        for one in _schemas(schema):
            if isinstance(one.get("$ref"), str) and (one["$ref"] == "#" or one["$ref"].startswith("#/")):
                one["$ref"] = root + one["$ref"][1:]
        properties = {NAME: {"const": names[place]}, ARGUMENTS: schema}
        yield {
            "type": "object",
            "properties": properties,
            "required": [NAME, ARGUMENTS],
            "additionalProperties": False,
        }


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema in a schema, itself first."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name, value in list(schema.items()):
        if name in _VALUES:
            continue
        inner = value.values() if name in _MAPS and isinstance(value, dict) else value if name in _LISTS else [value]
        for one in inner if isinstance(value, dict | list) else ():
            yield from _schemas(one)


def _is_composed(schema: dict[str, Any]) -> bool:
    """Whether it says with others together what properties an object may have: none of them may then be closed."""
    parts = schema.get("allOf", ())
    return ("properties" in schema and any(name in schema for name in _COMBINING)) or len(parts) > 1


def _lists_its_properties(schema: dict[str, Any]) -> bool:
    properties = schema.get("properties")
    if not isinstance(properties, dict) or any(name in schema for name in _OPENING):
        return False
    return set(schema.get("required") or ()) <= properties.keys()


async def _form(forms: TextForms, place: int, schema: dict[str, Any]) -> TextForm:
    try:
        return await _judged(forms, _format(schema))
    except InvalidRequestError as error:
        raise _renamed(error, f"tools[{place}].function.parameters") from None


async def _judged(forms: TextForms, format: ResponseFormat) -> TextForm:
    form = await forms.of(format)
    assert form is not None, "a schema is a form"
    return form


def _format(schema: dict[str, Any]) -> ResponseFormat:
    stated = JsonSchema.model_construct(name="call", description=None, schema_=schema, strict=None)
    return ResponseFormat.model_construct(type="json_schema", json_schema=stated, pattern=None)


def _renamed(error: InvalidRequestError, param: str) -> InvalidRequestError:
    """The same of the tools, where they are the form's origin."""
    found = error.param or param
    for name in (_SCHEMA, _FORMAT):
        found = found.replace(name, param, 1) if found.startswith(name) else found
    message = error.message.replace(_SCHEMA, param)
    return InvalidRequestError(message, param=found, hint=error.hint, code="invalid_tools")
