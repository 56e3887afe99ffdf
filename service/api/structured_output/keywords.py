"""The keywords of JSON Schema that are taken, and what their values must be; the rest are refused with their path."""

from __future__ import annotations

import difflib
from typing import Any, NoReturn, TypeGuard

from service.contract.errors import InvalidRequestError

MAX_PROPERTIES = 400  # of one schema, at all depths ...
MAX_ALL_PROPERTIES = 2000  # ... and of all that make one grammar
MAX_MULTIPLE = 1000
MAX_COUNT = 1_000_000  # characters, items, properties; more are never written

TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
ONE = frozenset({"items", "additionalItems", "additionalProperties", "propertyNames"})  # keywords with a schema ...
LISTS = frozenset({"prefixItems", "anyOf", "oneOf", "allOf"})  # ... a list of schemas ...
MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # ... or schemas by name
COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_TEXTS = frozenset({"$ref", "pattern", "format"})
_VALUES = COUNTS | _BOUNDS | _TEXTS | {"type", "nullable", "enum", "const", "required"}
# They say nothing about what fits; `discriminator` only repeats what the alternatives say.
NOTES = frozenset(
    {
        *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$comment", "$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$vocabulary", "discriminator", "xml"),
        *("externalDocs", "contentMediaType", "contentEncoding", "contentSchema", "minContains", "maxContains"),
    }
)
KEYWORDS = ONE | LISTS | MAPS | _VALUES | NOTES
# Keywords that are not enforced, at the values at which there is nothing to enforce.
NEUTRAL: dict[str, list[Any]] = {
    "uniqueItems": [False],
    "unevaluatedItems": [True, {}],
    "unevaluatedProperties": [True, {}],
    "dependentRequired": [{}],
    "dependentSchemas": [{}],
    "dependencies": [{}],
    "not": [False],
}
_SHOWN_CHARACTERS = 60
FORMAT, TOOLS = "response_format", "tools"  # the fields of requests that say what a text must be

Number = int | float


def refuse(path: str, reason: str, hint: str | None = None) -> NoReturn:
    """Raises the error for what stands at a path of the request."""
    raise InvalidRequestError(f"`{path}` {reason}", param=path, hint=hint, code=code_of(path))


def code_of(path: str) -> str:
    """The code of errors about what stands at a path of the request."""
    return "invalid_tools" if path.startswith(TOOLS) else "invalid_response_format"


def shown(text: str) -> str:
    """A name of the schema, as far as a message shows it."""
    return text[:_SHOWN_CHARACTERS]


def says_something(name: str, value: Any, given: dict[str, Any], path: str) -> bool:
    """Whether a keyword says something; refuses what it cannot say."""
    place = f"{path}.{shown(name)}"
    if name.startswith("x-") or name in NOTES:
        return name in ("$id", "$anchor")
    if any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(name, ())):
        return False
    if name == "uniqueItems" and value is True and given.get("maxItems") in (0, 1):
        return False
    if name not in KEYWORDS:
        close = difflib.get_close_matches(shown(name), {*KEYWORDS, *NEUTRAL} - {name}, n=1, cutoff=0.8)
        hint = f"did you mean `{close[0]}`?" if close else "leave it out, and check the answer for it"
        refuse(place, "is a keyword that this server does not enforce", hint)
    problem = _problem(name, value)
    if problem:
        refuse(place, problem)
    return True


def _problem(name: str, value: Any) -> str | None:
    """Return the fault of the value of a keyword that has no schema."""
    if name in COUNTS and not (is_number(value) and value >= 0 and value == int(value)):
        return "must be an integer, and not negative"
    if name in COUNTS and name.startswith("min") and value > MAX_COUNT:
        return f"must be at most {MAX_COUNT}"
    if name == "multipleOf" and not (is_number(value) and value == int(value) and 1 <= value <= MAX_MULTIPLE):
        return f"must be an integer from 1 to {MAX_MULTIPLE}"
    if name in _BOUNDS and not is_number(value) and not (name.startswith("exclusive") and isinstance(value, bool)):
        return "must be a number"
    if name in _TEXTS and not isinstance(value, str):
        return "must be a string"
    if name == "nullable" and not isinstance(value, bool):
        return "must be true or false"
    if name == "enum" and not (isinstance(value, list) and value):
        return "must be a list of at least one value"
    if name == "required" and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        return "must be a list of names"
    return None


def is_number(value: Any) -> TypeGuard[Number]:
    """Whether a value of JSON is a number; true is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
