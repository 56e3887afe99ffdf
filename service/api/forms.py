"""From `response_format` to the TextForm the engine enforces: bounds, keywords, and a trial in a process of its own.

Everything that can be wrong with a form is found here, before the engine hears of the request. What JSON Schema has
and the grammar library would leave out is refused by name. This file knows no HTTP and no vocabulary.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import msgspec

from service.api.fields import ResponseFormat
from service.api.regex_size import regex_size
from service.engine.grammar import refusal
from service.engine.grammar_check import Verdict
from service.engine.request import EngineInfo, TextForm
from service.errors import InvalidRequestError, OverloadedError, UnavailableError

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_PROPERTIES = 400  # of one schema, at all depths
MAX_MULTIPLE = 1000
MAX_REGEX_CHARACTERS = 4096
MAX_REGEX_SIZE = 10_000
MAX_COMPILE_SECONDS = 3.0

_CACHED = 256  # verdicts kept
_START_SECONDS = 60.0
_MOST_WAITING = 16  # new forms in the queue
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
        self._trial = _Trial(info, compile_seconds)
        self._thread = ThreadPoolExecutor(1, "forms")
        self._verdicts: OrderedDict[TextForm, str | None] = OrderedDict()
        self._waiting = 0

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
        self._trial.close()
        self._thread.shutdown(wait=False)

    async def _judge(self, form: TextForm) -> str | None:
        self._trial.check_open()
        if self._waiting >= _MOST_WAITING:
            raise OverloadedError("too many new forms of text are being compiled", param="response_format")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._trial.judge, form)
        finally:
            self._waiting -= 1


class _Trial:
    """The process of grammar_check.py, started when there is something to judge. For one thread, but for `close`."""

    def __init__(self, info: EngineInfo, seconds: float) -> None:
        arguments = [info.tokenizer_path, str(info.vocab_size), *map(str, info.eos_token_ids)]
        self._command = [sys.executable, "-m", "service.engine.grammar_check", *arguments]
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Lock()
        self._closed = False

    def check_open(self) -> None:
        """Raises UnavailableError once it is closed."""
        if self._closed:
            raise UnavailableError("the server is stopping", code="stopping", hint="send the request again")

    def judge(self, form: TextForm) -> str | None:
        """Why a form cannot be compiled; None: it can. Raises UnavailableError where that cannot be found out."""
        self.check_open()
        process = self._process
        if process is None:
            process = self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._closed:
                self._end()
            if self._ask(process, TextForm(regex="a"), _START_SECONDS) is None:  # that is not the form's fault
                self._end()
                self.check_open()
                raise UnavailableError("the process that compiles forms of text did not start")
        verdict = self._ask(process, form, self._seconds)
        if verdict is not None:
            return verdict.error
        self._end()
        self.check_open()
        return f"the form of text took over {self._seconds:g} seconds or too much memory to compile; simplify it"

    def close(self) -> None:
        """Ends the process for good, from any thread."""
        self._closed = True  # first: a process that is just being started is ended by who starts it
        self._end()

    def _end(self) -> None:
        """Ends the process, whatever it does."""
        with self._ending:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, process: subprocess.Popen[bytes], form: TextForm, seconds: float) -> Verdict | None:
        """None: there was no answer, or none in time."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(form) + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if ready else b""
            return msgspec.json.decode(line, type=Verdict) if line else None
        except (BrokenPipeError, ValueError, msgspec.DecodeError):  # it has ended, perhaps by close()
            return None


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
    _check_depth(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        size = len(text.encode())
    except ValueError:
        _refuse("", "has a number or a string that is not of JSON", None)
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


def _check_depth(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    _refuse("", f"is nested more than {MAX_SCHEMA_DEPTH} deep", None)


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
            close = difflib.get_close_matches(name, KEYWORDS, n=1, cutoff=0.8)
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
    if any("\ud800" <= character <= "\udfff" for character in pattern):
        raise InvalidRequestError(f"`{param}` has half of a surrogate pair, which is no text", param=param)
    size = regex_size(pattern)
    if size > MAX_REGEX_SIZE:
        raise InvalidRequestError(
            f"`{param}` has {size:.3g} parts with its repetitions written out; at most {MAX_REGEX_SIZE} are allowed",
            param=param,
            hint="use smaller counts, or * and +",
        )


def _refuse(path: str, reason: str, hint: str | None) -> NoReturn:
    param = _SCHEMA + path
    raise InvalidRequestError(f"`{param}` {reason}", param=param, hint=hint, code="invalid_response_format")
