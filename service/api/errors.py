"""Exceptions to HTTP answers: one shape for everything that goes wrong, and never a stack trace."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from http.client import responses
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service.api.field_hints import hint_for
from service.api.schemas.answers import ErrorAnswer, ErrorDetail
from service.api.schemas.bodies import (
    CompareBody,
    DetokenizeBody,
    GateBody,
    GenerateBody,
    LogBody,
    ScalingsBody,
    TokenizeBody,
)
from service.api.schemas.body import MISSING_FIELD, UNKNOWN_FIELD, UNSUPPORTED_FIELD
from service.api.schemas.openai import ChatBody, CompletionBody
from service.contract.errors import (
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    RequestError,
)

_BODIES: dict[str, type[BaseModel]] = {
    "/generate": GenerateBody,
    "/compare": CompareBody,
    "/scalings": ScalingsBody,
    "/scalings/log": LogBody,
    "/gate": GateBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}
_FIELDS = sorted({name for body in _BODIES.values() for name in body.model_fields})
_SHOWN_CHARACTERS = 60
_METHODS_OF_FILES = "GET, HEAD"  # those of the inspector's, whose refusal names none
_NO_OBJECT = ("model_type", "model_attributes_type", "dict_type")
_SUBJECT = re.compile(r"^(?:Input|String|List|Dictionary) should")
_SHORT = reprlib.Repr()  # three levels deep, and a few items of each


def install(app: FastAPI) -> None:
    """Registers the handlers."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


def error_body(error: RequestError) -> bytes:
    """The JSON of an error."""
    detail: ErrorDetail = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    if error.hint is not None:
        detail["hint"] = error.hint
    answer: ErrorAnswer = {"error": detail}
    try:
        return orjson.dumps(answer)
    except TypeError:  # a lone surrogate in a name the caller sent
        return json.dumps(answer).encode()


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """One error as an answer."""
    headers = dict(headers or {})
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    return Response(error_body(error), status_code=error.status, media_type="application/json", headers=headers)


def explain(errors: Sequence[Any], path: str) -> InvalidRequestError:
    """The first of pydantic's errors as one of ours; a field that has no place here goes before all others."""
    first = next((error for error in errors if error["type"] in (UNKNOWN_FIELD, UNSUPPORTED_FIELD)), errors[0])
    location = [f"[{part}]" if isinstance(part, int) else part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"the body cannot be read as JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == UNKNOWN_FIELD:
        return _unknown_field([*location, first["ctx"]["name"]], path)
    if first["type"] == UNSUPPORTED_FIELD:
        return _unsupported_field(_path([*location, first["ctx"]["name"]]), first["ctx"].get("hint"))
    if first["type"] == MISSING_FIELD:
        location.append(first["ctx"]["name"])
    param = _path(location) or None
    if first["type"] in ("missing", MISSING_FIELD):
        what = f"`{param}` is missing" if param else "the body is missing"
        return InvalidRequestError(what, param=param, code="missing_field")
    reason = _reason(first)
    if param is None and first["type"] in _NO_OBJECT:
        return InvalidRequestError(
            "the body must be a JSON object", hint="send it with the header Content-Type: application/json"
        )
    if param is None:
        field = reason.split(" ", 1)[0]  # a rule about several fields names the offender first
        return InvalidRequestError(
            reason if field in _FIELDS else f"the body {reason}", param=field if field in _FIELDS else None
        )
    hint = first["ctx"]["hint"] if first["type"] == "removed" else None
    return InvalidRequestError(f"`{param}` {reason} (got {_shown(first['input'])})", param=param, hint=hint)


def _reason(error: Any) -> str:
    """The reason in one of pydantic's errors, without its own terms: it speaks of models and of validation."""
    if error["type"] in _NO_OBJECT:
        return "should be an object"
    said = str(error["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    return _SUBJECT.sub("should", said)


def _unsupported_field(param: str, hint: str | None) -> InvalidRequestError:
    message = f"`{param}` is not supported by this server"
    return InvalidRequestError(message, param=param, code="unsupported_field", hint=hint or "leave it out")


def _unknown_field(location: list[str], path: str) -> InvalidRequestError:
    param = _path(location)
    hint = hint_for(location, _BODIES[path]) if path in _BODIES else f"known fields: {', '.join(_FIELDS)}"
    return InvalidRequestError(
        f"unknown field `{param[:_SHOWN_CHARACTERS]}`", param=param, code="unknown_field", hint=hint
    )


def _path(location: Sequence[str]) -> str:
    """settings, 1, experts, only -> settings[1].experts.only, as OpenAI writes it; a long name is the caller's own."""
    return ".".join(_cut(part) for part in location).replace(".[", "[")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _shown(value: object) -> str:
    """A value in a few words, however large it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return _cut(repr(value[: _SHOWN_CHARACTERS + 1]))
    return _cut(_SHORT.repr(value))


def foreign_error(status: int) -> RequestError:
    """An error of ours for one of a library's, of which only the status is known."""
    if status >= 500:
        return InternalError("an internal error occurred", hint="the server's log describes it, under X-Request-Id")
    error = InvalidRequestError(f"the request was refused: {responses.get(status, str(status)).lower()}")
    error.status = status
    return error


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(explain(error.errors(), request.scope["path"]))


def _methods_of(request: Request, known: str) -> str:
    """The methods of a path: every method is a route of its own, and the router names only the first one's."""
    documented = request.app.openapi()["paths"].get(getattr(request.scope.get("route"), "path", None), {})
    return ", ".join(sorted({*filter(None, known.split(", ")), *map(str.upper, documented)}))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    method, path = request.method, request.scope["path"]
    match error.status_code:
        case 400:
            found: RequestError = InvalidRequestError("the body could not be read as JSON", code="invalid_json")
        case 404:
            found = NotFoundError(f"no such path: {path}", hint="GET /docs lists them")
        case 405:
            headers["Allow"] = allowed = _methods_of(request, headers.get("Allow", _METHODS_OF_FILES))
            found = MethodNotAllowedError(f"{method} is not allowed on {path}", hint=f"use {allowed}")
        case 413:
            found = PayloadTooLargeError(str(error.detail))
        case status:
            found = foreign_error(status)
    return error_response(found, headers)
