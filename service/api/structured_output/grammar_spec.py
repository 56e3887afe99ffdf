"""From `response_format` to the TextForm the engine enforces: bounds, keywords, and a trial in a process of its own.

Everything that can be wrong with a form is found here, before the engine hears of the request. What JSON Schema has
and the grammar library would leave out is refused by name. This file knows no HTTP and no vocabulary.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NoReturn

from service.api.processes.bounded_process import BoundedProcess, Bounds, ChildDiedError, TookTooLongError
from service.api.schemas.fields import ResponseFormat
from service.api.structured_output.regex_size import regex_size
from service.api.structured_output.validation_process import Verdict
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError
from service.contract.request import TextForm
from service.grammar import refusal

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_PROPERTIES = 400  # of one schema, at all depths
MAX_MULTIPLE = 1000
MAX_REGEX_CHARACTERS = 4096
MAX_REGEX_SIZE = 10_000
MAX_COMPILE_SECONDS = 3.0

_CACHED = 256  # verdicts kept
_MAX_ASKING = 16  # new forms at once
_WAIT_SECONDS = 60.0  # for the others'
_MAX_VERDICT_BYTES = 64 * 1024
_SHOWN_CHARACTERS = 60

_ONE = frozenset({"items", "additionalItems", "additionalProperties"})  # keywords whose value is a schema ...
_LISTS = frozenset({"prefixItems", "anyOf", "oneOf", "allOf"})  # ... a list of schemas ...
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # ... or schemas by name
_VALUES = frozenset(
    {
        *("type", "enum", "const", "$ref", "minLength", "maxLength", "pattern", "format", "minimum", "maximum"),
        *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "minProperties"),
        *("maxProperties", "required"),
    }
)
_NOTES = frozenset(  # say nothing about what fits; `discriminator` only repeats what the alternatives say
    {
        *("title", "description", "default", "examples", "$comment", "$schema", "deprecated", "readOnly"),
        *("writeOnly", "discriminator"),
    }
)
KEYWORDS = _ONE | _LISTS | _MAPS | _VALUES | _NOTES
_SCHEMA = "response_format.json_schema.schema"
_PATTERN = "response_format.pattern"


class TextForms:
    """Forms of text for one model. What has been judged once is remembered."""

    def __init__(self, info: EngineInfo, compile_seconds: float = MAX_COMPILE_SECONDS) -> None:
        arguments = [info.tokenizer_path, str(info.vocab_size), *map(str, info.eos_token_ids)]
        self._process = BoundedProcess(
            [sys.executable, "-m", "service.api.structured_output.validation_process", *arguments],
            "the process that compiles forms of text",
            "response_format",
            Verdict,
            Bounds(compile_seconds, _WAIT_SECONDS, _MAX_ASKING, _MAX_VERDICT_BYTES),
        )
        self._verdicts: OrderedDict[TextForm, str | None] = OrderedDict()

    async def of(self, wanted: ResponseFormat | None) -> TextForm | None:
        """The form; None for any text. Raises InvalidRequestError for one that cannot be enforced as it is."""
        form = None if wanted is None else text_form(wanted)
        if form is None:
            return None
        if form in self._verdicts:
            self._verdicts.move_to_end(form)
        else:
            self._verdicts[form] = await self._judge(form)
            if len(self._verdicts) > _CACHED:
                self._verdicts.popitem(last=False)
        error = self._verdicts[form]
        if error is not None:
            raise refusal(error)
        return form

    def close(self) -> None:
        """Ends the process, at once. Who still waits for a verdict, or comes later, hears that the server stops."""
        self._process.close()

    async def _judge(self, form: TextForm) -> str | None:
        """Why a form cannot be compiled; None: it can."""
        try:
            return (await self._process.ask(form)).error
        except TookTooLongError as error:
            return f"the form of text {error} to compile; simplify it"
        except ChildDiedError as error:
            return f"compiling the form of text failed: its process {error}, perhaps for want of memory; simplify it"


def text_form(wanted: ResponseFormat) -> TextForm | None:
    """The form as the engine takes it, checked as far as no vocabulary is needed. Raises InvalidRequestError."""
    match wanted.type:
        case "json_object":
            return TextForm(json_schema='{"type":"object"}')
        case "json_schema":
            assert wanted.json_schema is not None
            return TextForm(json_schema=_checked_schema(wanted.json_schema.schema_))
        case "regex":
            assert wanted.pattern is not None
            _check_regex(wanted.pattern, _PATTERN)
            return TextForm(regex=wanted.pattern)
    return None


def _checked_schema(schema: dict[str, Any]) -> str:
    _check_values(schema)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    size = len(text.encode())
    if size > MAX_SCHEMA_BYTES:
        _refuse("", f"has {size} bytes; at most {MAX_SCHEMA_BYTES} are allowed", None)
    properties, multiples = 0, set()
    for path, one in _subschemas(schema, ""):
        _check_keywords(path, one)
        properties += sum(len(one[name]) for name in ("properties", "patternProperties") if name in one)
        multiples |= {one["multipleOf"]} if "multipleOf" in one else set()
    if properties > MAX_PROPERTIES:
        _refuse("", f"has {properties} properties in all; at most {MAX_PROPERTIES} are allowed", None)
    if math.prod(multiples) > MAX_MULTIPLE:
        _refuse("", f"has values of multipleOf whose product is over {MAX_MULTIPLE}", None)
    return text


def _check_values(schema: dict[str, Any]) -> None:
    """Depth, numbers and strings; stops where the size is plainly over the bound, because it may be megabytes."""
    level: list[tuple[str, Any]] = [("", schema)]
    size = 0  # in bytes, at least
    for _ in range(MAX_SCHEMA_DEPTH):
        size += sum(len(value) if isinstance(value, str | dict | list) else 1 for _, value in level)
        if size > MAX_SCHEMA_BYTES:
            _refuse("", f"has over {MAX_SCHEMA_BYTES} bytes; at most {MAX_SCHEMA_BYTES} are allowed", None)
        for path, value in level:
            _check_value(path, value)
        level = [child for path, value in level for child in _children(path, value)]
        if not level:
            return
    _refuse("", f"is nested more than {MAX_SCHEMA_DEPTH} deep", None)


def _check_value(path: str, value: Any) -> None:
    if isinstance(value, int) and not -(2**63) < value < 2**64:
        _refuse(path, f"is an integer of {value.bit_length()} bits", "integers go from -2^63 + 1 to 2^64 - 1")
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(path, "is a number that JSON does not have", "the largest is 1.8e308")
    for text in (value,) if isinstance(value, str) else value if isinstance(value, dict) else ():
        if not _is_text(text):
            _refuse(path, "has half of a surrogate pair, which is no text", None)


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        return ((f"{path}.{name[:_SHOWN_CHARACTERS]}", child) for name, child in value.items())
    return ((f"{path}.{number}", child) for number, child in enumerate(value if isinstance(value, list) else ()))


def _subschemas(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in a schema, itself first, with its path. Raises InvalidRequestError where there should be one."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        _refuse(path, "is not a schema: an object, true or false", None)
    for name in _MAPS & schema.keys():
        if not isinstance(schema[name], dict):
            _refuse(f"{path}.{name}", "must be an object of schemas", None)
    yield path, schema
    for name in schema:
        value, place = schema[name], f"{path}.{name}"
        if name in _MAPS:
            for key in value:
                yield from _subschemas(value[key], f"{place}.{key[:_SHOWN_CHARACTERS]}")
        elif name in _LISTS:
            if not isinstance(value, list):
                _refuse(place, "must be a list of schemas", None)
            for number, one in enumerate(value):
                yield from _subschemas(one, f"{place}.{number}")
        elif name in _ONE:
            yield from _subschemas(value, place)


def _check_keywords(path: str, schema: dict[str, Any]) -> None:
    for name in schema:
        if name not in KEYWORDS:
            close = difflib.get_close_matches(name[:_SHOWN_CHARACTERS], KEYWORDS, n=1, cutoff=0.8)
            hint = f"did you mean `{close[0]}`?" if close else "leave it out, and check the answer for it"
            _refuse(f"{path}.{name[:_SHOWN_CHARACTERS]}", "is a keyword that this server does not enforce", hint)
    for name in ("pattern", *schema.get("patternProperties", ())):
        pattern = schema.get(name) if name == "pattern" else name
        if isinstance(pattern, str):
            _check_regex(pattern, f"{_SCHEMA}{path}.pattern")
    multiple = schema.get("multipleOf", 1)
    if type(multiple) is not int or not 1 <= multiple <= MAX_MULTIPLE:
        _refuse(f"{path}.multipleOf", f"must be an integer from 1 to {MAX_MULTIPLE}", None)


def _check_regex(pattern: str, param: str) -> None:
    if len(pattern) > MAX_REGEX_CHARACTERS:
        raise InvalidRequestError(
            f"`{param}` has {len(pattern)} characters; at most {MAX_REGEX_CHARACTERS} are allowed", param=param
        )
    if not _is_text(pattern):
        raise InvalidRequestError(f"`{param}` has half of a surrogate pair, which is no text", param=param)
    size = regex_size(pattern)
    if size > MAX_REGEX_SIZE:
        raise InvalidRequestError(
            f"`{param}` has {size:.3g} parts with its repetitions written out; at most {MAX_REGEX_SIZE} are allowed",
            param=param,
            hint="use smaller counts, or * and +",
        )


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(path: str, reason: str, hint: str | None) -> NoReturn:
    param = _SCHEMA + path
    raise InvalidRequestError(f"`{param}` {reason}", param=param, hint=hint, code="invalid_response_format")
