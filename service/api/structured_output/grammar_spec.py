"""From `response_format`, or functions of which one is to be called, to the GrammarSpec that the engine enforces.
Bounds are checked here, all else in a process of its own.

Everything that can be wrong with a form is found before the engine hears of the request. This file knows no HTTP, no
keyword and no vocabulary.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from service.api.processes.bounded_process import BoundedProcess, Bounds, ChildDiedError, TookTooLongError
from service.api.schemas.fields import ResponseFormat
from service.api.structured_output.keywords import FORMAT, TOOLS, code_of, refuse, shown
from service.api.structured_output.number_regex import MAX_DIGITS, is_too_long
from service.api.structured_output.regex_size import check_regex_size
from service.api.structured_output.schema import Document
from service.api.structured_output.validation_process import Question, SentSchema, Validation
from service.contract.engine_info import EngineInfo
from service.contract.errors import InvalidRequestError, OverloadedError
from service.contract.request import FormLimits, GrammarSpec

MAX_SCHEMA_BYTES = 64 * 1024
MAX_ALL_BYTES = 512 * 1024  # of the schemas of all functions
MAX_SCHEMA_DEPTH = 32
MAX_COMPILE_SECONDS = 3.0

_LONE_BACKSLASH = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
_CACHED = 256  # verdicts kept
_MAX_ASKING = 16  # new forms at once
_WAIT_SECONDS = 60.0  # for the others'
_MAX_VALIDATION_BYTES = 4 * 1024 * 1024


class GrammarSpecs:
    """Grammars for one model; each is validated once and then remembered."""

    def __init__(
        self, info: EngineInfo, limits: FormLimits | None = None, compile_seconds: float = MAX_COMPILE_SECONDS
    ) -> None:
        arguments = [info.tokenizer_path, str(info.vocab_size), *map(str, info.eos_token_ids)]
        self._process = BoundedProcess(
            [sys.executable, "-m", "service.api.structured_output.validation_process", *arguments],
            "the process that compiles structured output",
            FORMAT,
            Validation,
            Bounds(compile_seconds, _WAIT_SECONDS, _MAX_ASKING, _MAX_VALIDATION_BYTES),
        )
        self._limits = limits or FormLimits()
        self._validations: OrderedDict[Question, Validation] = OrderedDict()

    async def of(self, wanted: ResponseFormat | None) -> GrammarSpec | None:
        """The grammar; None for any text. Raises InvalidRequestError for one that cannot be enforced as it is."""
        question = None if wanted is None else question_of(wanted, self._limits)
        return None if question is None else await self._form(question)

    async def of_call(self, functions: Mapping[str, Document]) -> GrammarSpec:
        """The grammar of a call of one of the functions, given with the schemas of their arguments: one function's own
        arguments, else as calls_grammar has it. Raises as `of` does.
        """
        return await self._form(question_of_call(functions, self._limits))

    async def _form(self, question: Question) -> GrammarSpec:
        if question in self._validations:
            self._validations.move_to_end(question)
        else:
            self._validations[question] = await self._judge(question)
            if len(self._validations) > _CACHED:
                self._validations.popitem(last=False)
        validation = self._validations[question]
        if validation.error is not None:
            param = validation.param or question.param
            raise InvalidRequestError(validation.error, param=param, hint=validation.hint, code=code_of(param))
        return GrammarSpec(validation.grammar, question.regex, question.field)

    def close(self) -> None:
        """Ends the process, at once. Who still waits for a validation, or comes later, hears that the server stops."""
        self._process.close()

    async def _judge(self, question: Question) -> Validation:
        try:
            return await self._process.ask(question)
        except OverloadedError as error:
            error.param = question.field  # the process does not know whose it is
            raise
        except TookTooLongError as error:
            return Validation(error=f"the grammar {error} to compile; simplify it")
        except ChildDiedError as error:
            return Validation(
                error=f"compiling the grammar failed: its process {error}, perhaps for want of memory; simplify it"
            )


def question_of(wanted: ResponseFormat, limits: FormLimits) -> Question | None:
    """The form, checked as far as no vocabulary is needed; None for any text. Raises InvalidRequestError."""
    match wanted.type:
        case "json_object":
            return Question(FORMAT, SentSchema(FORMAT, '{"type":"object"}'), limits=limits)
        case "json_schema":
            assert wanted.json_schema is not None
            sent = _sent(Document(f"{FORMAT}.json_schema.schema", wanted.json_schema.schema_))
            return Question(sent.path, sent, limits=limits)
        case "regex":
            assert wanted.pattern is not None
            path = f"{FORMAT}.pattern"
            check_regex_size(wanted.pattern, path)
            if _LONE_BACKSLASH.search(wanted.pattern):
                refuse(path, "ends with a backslash")  # which the library would leave out
            return Question(path, regex=wanted.pattern)
    return None


def question_of_call(functions: Mapping[str, Document], limits: FormLimits) -> Question:
    """A call of one of the functions, checked in the same way. Raises InvalidRequestError."""
    sent = {name: _sent(document) for name, document in functions.items()}
    if len(sent) == 1:
        [arguments] = sent.values()
        return Question(arguments.path, arguments, limits=limits)
    size = sum(len(one.json.encode()) for one in sent.values())
    if size > MAX_ALL_BYTES:
        refuse(TOOLS, f"have schemas of {size} bytes in all; at most {MAX_ALL_BYTES} are allowed")
    return Question(TOOLS, calls=tuple(sent.items()), limits=limits)


def _sent(document: Document) -> SentSchema:
    path, schema = document.path, document.schema
    _check_values(path, schema)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    size = len(text.encode())
    if size > MAX_SCHEMA_BYTES:
        refuse(path, f"has {size} bytes; at most {MAX_SCHEMA_BYTES} are allowed")
    return SentSchema(path, text)


def _check_values(root: str, schema: dict[str, Any]) -> None:
    """Depth, numbers and strings; stops where the size is plainly over the bound, because it may be megabytes."""
    level: list[tuple[str, Any]] = [(root, schema)]
    size = 0  # in bytes, at least
    for _ in range(MAX_SCHEMA_DEPTH):
        size += sum(len(value) if isinstance(value, str | dict | list) else 1 for _, value in level)
        if size > MAX_SCHEMA_BYTES:
            refuse(root, f"has over {MAX_SCHEMA_BYTES} bytes; at most {MAX_SCHEMA_BYTES} are allowed")
        for path, value in level:
            _check_value(path, value)
        level = [child for path, value in level for child in _children(path, value)]
        if not level:
            return
    refuse(root, f"is nested more than {MAX_SCHEMA_DEPTH} deep")


def _check_value(path: str, value: Any) -> None:
    if isinstance(value, int) and is_too_long(value):
        refuse(path, f"is an integer of {value.bit_length()} bits", f"integers have at most {MAX_DIGITS} digits")
    if isinstance(value, float) and not math.isfinite(value):
        refuse(path, "is a number that JSON does not have", "the largest is 1.8e308")
    for text in (value,) if isinstance(value, str) else value if isinstance(value, dict) else ():
        if not _is_text(text):
            refuse(path, "has half of a surrogate pair, which is no text")


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        return ((f"{path}.{shown(name)}", child) for name, child in value.items())
    return ((f"{path}.{number}", child) for number, child in enumerate(value if isinstance(value, list) else ()))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
